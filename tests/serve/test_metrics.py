"""Metrics under the names that dashboards know, and the page."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from effinfer.engine import Engine
from effinfer.loading import load_model
from effinfer.models import recursive_demo_path
from effinfer.serve import ServeSettings, create_app
from tests.serve.running import RunningServer


def scraped(server):
    families = text_string_to_metric_families(server.client.get("/metrics").text)
    return {(s.name, *s.labels.values()): s.value for f in families for s in f.samples}


def test_metrics_count_what_happened(make_server):
    server = make_server(loops=3)
    assert server.complete(n=2, max_tokens=6).status_code == 200
    server.wait_idle()
    found = scraped(server)
    assert found["vllm:prompt_tokens_total",] == 6
    assert found["vllm:generation_tokens_total",] == 12
    assert found["vllm:request_success_total", "length"] == 2
    assert found["vllm:num_requests_running",] == 0
    assert found["vllm:num_requests_waiting",] == 0
    assert found["vllm:e2e_request_latency_seconds_count",] == 2
    assert found["vllm:time_to_first_token_seconds_count",] == 2
    assert found["vllm:kv_cache_usage_perc",] == 0
    assert found["effinfer:token_depth_bucket", "2"] == 0
    assert found["effinfer:token_depth_bucket", "3"] == found["effinfer:token_depth_count",] == 12
    assert found["effinfer:token_depth_sum",] == 36
    assert found["effinfer:rows_at_loop_total", "0"] == found["effinfer:rows_at_loop_total", "2"]
    assert found["effinfer:ready",] == 1


def test_metrics_of_drafts_and_exits():
    model, tokenizer = load_model(recursive_demo_path())

    def make_engine():
        # Rows cost nothing more in a launch: whether drafts pay on this machine is another question.
        costs = {"token_budget": 64, "costs": [1e-3] * 64}
        return Engine(model, tokenizer, mode="lossless", max_slots=4, **costs)

    settings = ServeSettings(model_name="demo-recursive")
    with RunningServer(create_app(make_engine, tokenizer, settings), settings) as server:
        assert server.complete("The :mod:`json` module", max_tokens=60).status_code == 200
        found = scraped(server)
    drafted = found["effinfer:rows_total", "draft"]
    accepted = found["vllm:spec_decode_num_accepted_tokens_total",]
    wasted = found["effinfer:draft_rows_wasted_total",]
    assert 0 < accepted <= drafted
    assert wasted < drafted
    checked, agreed = (found[f"effinfer:exits_{what}_total",] for what in ("checked", "agreed"))
    assert 0 < agreed <= checked <= 60
    assert 0 < found["effinfer:token_depth_sum",] < 4 * 60


def test_page_is_one_file_that_asks_no_other_host(server):
    page = server.client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text
    assert "https://" not in page.text
    live = server.client.get("/live").json()
    assert live["ready"] is True
    assert len(live["engine"]["depths"]) == 1
