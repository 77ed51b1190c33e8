"""The records of a drop folder's jobs: what was written by any version can be read, and damage is seen."""

from pathlib import Path

import pytest

from artifacts_schema.errors import Damaged
from artifacts_schema.jobs import STAGES, Ended, Job, Jobs, Trouble
from artifacts_schema.manifests import Settings
from artifacts_schema.prompts import Prompt

GOLDEN = Path(__file__).parent / "golden" / "jobs"  # written by each version's `Jobs`, from JOB, TROUBLE and ENDED
ID = "18ea143c32e3de93"
JOB = Job(
    id=ID,
    run="cats",
    source="cats.toml",
    sha256="0" * 64,
    model="demo",
    embeddings_dtype="float32",
    dtype="float32",
    decode_dtype="float32",
    priority=2,
    prompts=(
        Prompt(
            prompt='a "cat" 😀',
            negative_prompt=" ",
            name="tom",
            settings=Settings(seeds=(1, 2), width=64, height=32, num_inference_steps=4, true_cfg_scale=1.0),
        ),
    ),
)
TROUBLE = Trouble(attempts=2, failed=1, reached="3/17", given_up=(("1" * 32, "it is NaN"),), log=("a line",))
ENDED = Ended(job=JOB, outcome="failed", at=1.5e9, pictures=1, reason="decode: it is NaN", log=("a line",))


@pytest.fixture
def jobs(tmp_path) -> Jobs:
    jobs = Jobs(tmp_path)
    for directory in (jobs.open, jobs.ended, *map(jobs.stage, STAGES)):
        directory.mkdir(parents=True)
    return jobs


def place(jobs: Jobs, content: dict[str, bytes]) -> None:
    directories = {"job": jobs.open, "trouble": jobs.stage("denoise"), "ended": jobs.ended}
    for name, data in content.items():
        (directories[name.partition("-")[0]] / f"{ID}.json").write_bytes(data)


def without_checksum(record):
    return record and type(record)(**{f: getattr(record, f) for f in record.__struct_fields__ if f != "checksum"})


def read(jobs: Jobs) -> list:
    job, ended = jobs.read(ID), jobs.read_ended(ID)
    ended = ended and Ended(**{**{f: getattr(ended, f) for f in ended.__struct_fields__}, "checksum": ""})
    return [without_checksum(job), without_checksum(jobs.read_trouble(ID, "denoise")), ended]


@pytest.mark.parametrize(
    "names",
    [("job-1", "trouble-1", "ended-1"), ("job-2", "trouble-1", "ended-2"), ("job-3", "trouble-1", "ended-3")],
)
def test_golden_records_of_every_version_can_be_read(jobs, names):
    place(jobs, {name: (GOLDEN / f"{name}.json").read_bytes() for name in names})
    assert read(jobs) == [JOB, TROUBLE, ENDED]


def test_what_is_written_is_what_is_read(jobs):
    jobs.add(JOB)
    jobs.write_trouble(ID, "denoise", TROUBLE)
    jobs.end(ENDED)
    assert read(jobs) == [JOB, TROUBLE, ENDED]
    assert jobs.open_ids() == jobs.ended_ids() == [ID]
    jobs.preview(ID).write_bytes(b"x")
    jobs.close(ID)
    assert read(jobs) == [None, Trouble(), ENDED]
    assert not jobs.preview(ID).exists()


def test_any_flipped_byte_is_seen(jobs):
    jobs.add(JOB)
    path = jobs.open / f"{ID}.json"
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(Damaged):
            jobs.read(ID)


def test_a_stage_clears_away_what_belongs_to_no_open_job(jobs):
    jobs.add(JOB)
    jobs.write_trouble(ID, "denoise", TROUBLE)
    jobs.write_trouble("0" * 16, "denoise", TROUBLE)
    (jobs.stage("denoise") / ".tmp-0123456789abcdef").write_bytes(b"x")
    (jobs.stage("denoise") / f"{'0' * 16}.webp").write_bytes(b"x")
    jobs.sweep("denoise")
    assert [path.name for path in jobs.stage("denoise").iterdir()] == [f"{ID}.json"]
