from evals.rows.store import Results, load_rows


def test_rows_that_another_process_left_are_taken_in_once(tmp_path):
    row = {"task": "a", "status": "ok", "done": True}
    results = Results(tmp_path, {}, {})
    results.append(row)
    left = tmp_path / "rows.1.jsonl"
    text = (tmp_path / "rows.jsonl").read_text()
    left.write_text(text + text.replace('"a"', '"b"') + '{"task": "c", "sta')
    assert [r["task"] for r in load_rows(results.path)] == ["a", "b"]
    assert Results(tmp_path, {}, {}).finished == {"a", "b"}
    assert not left.exists()
    assert [r["task"] for r in load_rows(results.path)] == ["a", "b"]
