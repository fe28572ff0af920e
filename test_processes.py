def test_text(api, start_worker):
    start_worker()
    j = api.text("hello [tokens 5]")
    d = api.wait(j)
    assert d["status"] == "completed"
    api.wait_notice(j, "completed")
    assert api.notices(j) == ["processing", "completed"]
