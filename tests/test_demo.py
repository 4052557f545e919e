"""The demo's plan: what it shows is a function of its seed, and its prompts are asked as people ask."""

from unimm.data.shapes import TAGS
from unimm.data.shapes.prompts import OPENINGS, split_of
from unimm.demo import DemoPlan


def test_prompts_are_held_out_requests_of_every_tag() -> None:
    plan = DemoPlan.sample(0)
    assert plan == DemoPlan.sample(0) != DemoPlan.sample(1)
    assert [prompt.tag for prompt in plan.prompts] == [tag for tag in TAGS for _ in range(2)]
    texts = [prompt.prompt for prompt in plan.prompts]
    assert len(set(texts)) == 12 and sum(text.startswith(tuple(OPENINGS)) for text in texts) < 3
    openings = {text.split()[0] for text in texts}
    assert len(openings) >= 4, "several kinds of wording"
    assert not any(text.startswith(("Draw ", "draw ")) and split_of(text) == "train" for text in texts)
    for prompt in plan.prompts:
        assert not prompt.names_withheld and prompt.metadata()["include"]
