from rlbench.checks.health_watch import HealthWatch, finding_line

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
