from rlbench.checks.health_watch import HealthWatch, finding_line, is_due

CUT = [{"step": step, "reward/mean": 0.5, "completion/truncated_frac": 0.9} for step in range(1, 21)]


def test_a_rule_speaks_once_and_names_what_to_change():
    watch = HealthWatch({"sampling": {"max_tokens": 64}})
    first = watch.news(CUT, [])

    assert [finding.rule for finding in first] == ["truncation"]
    line = finding_line(first[0])
    assert "90" in line and "try sampling.max_tokens" in line
    assert watch.news(CUT, []) == []


def test_a_run_without_findings_says_nothing():
    assert HealthWatch({}).news([{"step": 1, "reward/mean": 0.5}], []) == []


def test_looks_are_frequent_at_first_and_read_each_step_a_bounded_number_of_times():
    looks = [step for step in range(1, 100_001) if is_due(step)]

    assert looks[:4] == [5, 10, 15, 20] and 495 in looks and 505 not in looks
    for length in (1_000, 10_000, 100_000):
        made = [step for step in looks if step <= length]
        assert sum(made) < 110 * length  # rows read: a fixed number of times each, in place of length / 10
        assert made[-1] > 0.97 * length and max(b - a for a, b in zip(made, made[1:], strict=False)) <= length / 50
