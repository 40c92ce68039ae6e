"""Mutants that the rows' tests cannot tell from the right program, because nothing can: found by plain execution."""

EQUIVALENT = {
    ("on_numbers/factorial_zeros", "while n > 0: -> while n > 1:"): "1 // 5 is 0",
    (
        "on_numbers/in_base",
        "return '0123456789abcdef'[n] -> return '0123456789abcdefx'[n]",
    ): "no digit lies behind f in base 16",
    (
        "on_numbers/roman_value",
        "for here, after in zip(text, text[1:] + ' '): -> for here, after in zip(text, text[1:] + ' x'):",
    ): "zip ends with the shorter text",
    (
        "on_numbers/roman_value",
        "total += -value if value < values.get(after, 0) else value -> "
        "total += -value if value < values.get(after, 1) else value",
    ): "no numeral is below 1",
    ("on_numbers/clamp", "if x < low: -> if x <= low:"): "x is low then",
    ("on_numbers/clamp", "if x > high: -> if x >= high:"): "x is high then",
    (
        "on_numbers/triangle_kind",
        "if a <= 0 or a + b <= c: -> if a < 0 or a + b <= c:",
    ): "0 + b <= c holds with b <= c",
    ("on_numbers/root_between", "for _ in range(60): -> for _ in range(61):"): "one halving more",
    (
        "on_numbers/root_between",
        "if value_at(coefficients, middle) < 0: -> if value_at(coefficients, middle) <= 0:",
    ): "the other side of an exact root",
    (
        "on_lists/merged",
        "if j == len(b) or (i < len(a) and a[i] <= b[j]): -> if j == len(b) or (i < len(a) and a[i] < b[j]):",
    ): "equal numbers in the other order",
    ("on_lists/place_of", "for _ in range(64): -> for _ in range(65):"): "no list takes 64 halvings",
    (
        "on_lists/place_of",
        "if numbers[middle] < wanted: -> if numbers[middle] <= wanted:",
    ): "equality has returned before",
    ("on_records/best_value", "best = [0] * (room + 1) -> best = [0] * (room + 2)"): "an entry that nothing reads",
    ("on_records/winner", "return line[0] -> return line[1]"): "all of the line are equal",
    (
        "on_records/winner",
        "if line[0] != '.' and line == [line[0]] * 3: -> if line[1] != '.' and line == [line[0]] * 3:",
    ): "all of the line are equal",
    (
        "on_records/winner",
        "if line[0] != '.' and line == [line[0]] * 3: -> if line[0] != '.' and line == [line[1]] * 3:",
    ): "all of the line are equal",
    (
        "on_records/fewest_coins",
        "fewest = [0] + [amount + 1] * amount -> fewest = [0] + [amount + 2] * amount",
    ): "both are more than any answer",
    (
        "of_mbpp_form/area_of",
        "total += x1 * y2 - x2 * y1 -> total -= x1 * y2 - x2 * y1",
    ): "the sign is dropped in the end",
}
