"""Tables to print."""


def text_table(rows: list[tuple[str, ...]], num_left: int) -> str:
    """Cells in columns, with rules below the first row and above the last.

    Arguments:

    - `rows`: the cells, equally many in every row.
    - `num_left`: how many columns are left-aligned; the rest, which are numbers, are right-aligned.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    sides = ["<"] * num_left + [">"] * (len(widths) - num_left)
    lines = [
        "  ".join(f"{x:{side}{n}}" for x, side, n in zip(row, sides, widths, strict=True))
        for row in rows
    ]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])
