"""Numbers as a person reads them."""

COUNT_UNITS = ("", "K", "M", "B", "T")
BYTE_UNITS = (" B", " KiB", " MiB", " GiB", " TiB", " PiB")


def format_count(count: float) -> str:
    """671026419200 as "671.0B": thousands, millions, billions, trillions; below 1000 as it is."""
    return _scaled(round(count), 1000, COUNT_UNITS)


def format_bytes(size: float) -> str:
    """1610612736 as "1.5 GiB"; below one KiB in whole bytes."""
    return _scaled(round(size), 1024, BYTE_UNITS)


def format_duration(seconds: float) -> str:
    """65 as "1m 05s": the two largest of days, hours, minutes and seconds."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}h"
    if hours:
        return f"{hours}h {minute:02}m"
    if minutes:
        return f"{minutes}m {second:02}s"
    return f"{second}s"


def _scaled(value: int, base: int, units: tuple[str, ...]) -> str:
    if value < base:
        return f"{value}{units[0]}"
    scaled, unit = float(value), 0
    # Rounded first: 999,960 is 1.0M, not 1000.0K.
    while round(scaled, 1) >= base and unit + 1 < len(units):
        scaled /= base
        unit += 1
    return f"{scaled:.1f}{units[unit]}"


def format_amount(number: float) -> str:
    """Of what may be a fraction: "0.091", "113.3K"."""
    return format_count(number) if number >= 1000 else f"{number:.4g}"
