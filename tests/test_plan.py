"""What to run next, from what is there: the planner is pure, so it is asked directly."""

from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from artifacts_schema.jobs import STAGES
from orchestrator import plan
from orchestrator.plan import Order, Work


def work(id: str, *stages: str, priority: int = 0, served: int = 0, model: str = "m") -> Work:
    following = {stage: (f"{id}-{stage}",) for stage in stages}
    loads = dict.fromkeys(STAGES, (model, "float32"))
    return Work(id, id, priority, 0, 0, 1, loads, following, dict.fromkeys(STAGES, served))


def choose(works: list[Work], stages: tuple[str, ...], current: str | None, turn_over: bool) -> Order | None:
    return plan.choose(works, stages, (current, ("m", "float32")) if current else None, turn_over)


def chosen(order: Order | None) -> tuple[str, str] | None:
    return (order.id, order.stage) if order else None


def test_nothing_to_do():
    assert choose([], STAGES, None, False) is None
    assert choose([work("a", "decode")], ("encode", "denoise"), None, False) is None


def test_all_prompts_are_encoded_first_then_all_denoised_then_all_decoded():
    works = [work("a", "encode"), work("b", "decode"), work("c", "denoise"), work("d", "encode")]
    assert chosen(choose(works, STAGES, None, False)) == ("a", "encode")
    assert chosen(choose(works[1:], STAGES, "encode", False)) == ("d", "encode")
    assert chosen(choose(works[1:3], STAGES, "encode", False)) == ("c", "denoise")
    assert chosen(choose(works[1:2], STAGES, "denoise", False)) == ("b", "decode")


def test_a_loaded_model_goes_on_until_its_turn_is_over():
    works = [work("long", "denoise", served=9), work("new", "encode")]
    assert chosen(choose(works, STAGES, "denoise", False)) == ("long", "denoise")
    assert chosen(choose(works, STAGES, "denoise", True)) == ("new", "encode")
    assert chosen(choose(works[:1], STAGES, "denoise", True)) == ("long", "denoise")


def test_what_is_nearly_finished_comes_before_what_is_new():
    works = [work("long", "denoise"), work("new", "encode"), work("old", "decode")]
    assert chosen(choose(works, STAGES, "denoise", True)) == ("old", "decode")
    assert chosen(choose(works, STAGES, "decode", True)) == ("new", "encode")


def test_the_job_that_was_served_longest_ago_comes_next():
    works = [work("long", "denoise", served=5), work("small", "denoise", served=3), work("new", "denoise")]
    assert chosen(choose(works, STAGES, "denoise", False)) == ("new", "denoise")
    assert chosen(choose(works[:2], STAGES, "denoise", False)) == ("small", "denoise")


def test_what_the_loaded_model_can_do_comes_before_another_model_until_its_turn_is_over():
    works = [work("a", "denoise", served=5), work("b", "denoise", model="other"), work("c", "encode")]
    assert chosen(choose(works, STAGES, "denoise", False)) == ("a", "denoise")
    assert chosen(choose(works[:2], STAGES, "denoise", True)) == ("b", "denoise")
    assert chosen(choose(works[1:], STAGES, "denoise", False)) == ("c", "encode")
    assert chosen(choose(works[1:2], STAGES, "denoise", False)) == ("b", "denoise")


def test_priority_comes_before_everything():
    works = [work("a", "denoise"), work("b", "decode", priority=-1), work("c", "decode", priority=2, served=9)]
    assert chosen(choose(works, STAGES, "denoise", False)) == ("c", "decode")
    assert chosen(choose(works[:2], STAGES, "decode", False)) == ("a", "denoise")


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 2)), min_size=1, max_size=6), st.integers(1, 4))
def test_every_picture_is_made_once_and_no_job_waits_for_a_longer_one(sizes, turn):
    """Jobs of so many pictures, arriving after so many orders; a turn lasts so many orders."""
    left = {f"{n:02}": {"encode": 1, "denoise": size, "decode": 0} for n, (size, _) in enumerate(sizes)}
    arrival = {f"{n:02}": after for n, (_, after) in enumerate(sizes)}
    served: dict[tuple[str, str], int] = {}
    finished, current, since = [], None, 0
    for now in count():
        works = []
        for id in (id for id in left if arrival[id] <= now and any(left[id].values())):
            stages = ["encode"] if left[id]["encode"] else [stage for stage in STAGES if left[id][stage]]
            each = work(id, *stages)
            works.append(each._replace(served={stage: served.get((id, stage), 0) for stage in STAGES}))
        if not works and all(arrival[id] <= now for id in left):
            break
        order = choose(works, STAGES, current, now - since >= turn)
        if order is None:
            continue
        if order.stage != current:
            current, since = order.stage, now
        left[order.id][order.stage] -= 1
        served[order.id, order.stage] = now + 1
        if order.stage == "denoise":
            left[order.id]["decode"] += 1
        if order.stage == "decode" and not any(left[order.id].values()):
            finished.append(order.id)
        assert now < 200
    assert sorted(finished) == sorted(left)
    assert all(value == 0 for each in left.values() for value in each.values())


def test_a_small_job_does_not_wait_for_a_long_one():
    left = {"long": 100, "small": 2}
    served = {"long": 0, "small": 0}
    for now in range(1, 10):
        works = [work(id, "denoise", served=served[id]) for id in left if left[id]]
        order = choose(works, STAGES, "denoise", False)
        assert order is not None
        left[order.id] -= 1
        served[order.id] = now
    assert left["small"] == 0
