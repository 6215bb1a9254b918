"""``qegg.generate``: closed meshes that other programs can read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh

from hcna_ray.core.models import Outcome
from hcna_ray.handlers import HandlerOutcome, InvalidPayload, Registry, run_handler
from hcna_ray.handlers.builtin.qegg import dodecahedron, on_sphere, refine

FORMATS = ["glb", "obj", "stl", "ply"]


@pytest.fixture
def generate(context: Any, registry: Registry) -> Any:
    def start(**payload: object) -> HandlerOutcome:
        raw = json.dumps(payload).encode()
        return run_handler(registry.get("qegg.generate"), raw, context("qegg.generate"))

    return start


def result_of(outcome: HandlerOutcome) -> dict[str, Any]:
    assert outcome.error is None, outcome.error
    found: dict[str, Any] = json.loads(outcome.result or b"")
    return found


def test_level_0_is_the_regular_dodecahedron() -> None:
    points, faces = dodecahedron()
    mesh = trimesh.Trimesh(points, faces, process=False)

    assert (len(points), len(faces)) == (32, 60)
    assert mesh.is_watertight
    assert mesh.is_winding_consistent
    ways, counts = np.unique(mesh.face_normals.round(9), axis=0, return_counts=True)
    assert (len(ways), set(counts)) == (12, {5})  # Each pentagon's triangles lie in one plane.
    edge = 4 / (3**0.5 * (1 + 5**0.5))
    assert mesh.volume == pytest.approx((15 + 7 * 5**0.5) / 4 * edge**3)
    assert np.allclose(np.linalg.norm(points[:20], axis=1), 1)


def test_refining_quadruples_the_faces_and_stays_on_the_sphere() -> None:
    points, faces = dodecahedron()
    points = on_sphere(points)
    for level in range(1, 4):
        before = points.copy()
        finer, faces = refine(points, faces)
        assert np.array_equal(points, before)
        points = finer
        assert (len(points), len(faces)) == (30 * 4**level + 2, 60 * 4**level)
        assert np.allclose(np.linalg.norm(points, axis=1), 1)
        mesh = trimesh.Trimesh(points, faces, process=False)
        assert mesh.is_watertight
        assert mesh.is_winding_consistent
        assert mesh.volume > 0
    assert mesh.volume == pytest.approx(4 / 3 * np.pi, rel=0.01)


@pytest.mark.parametrize("level", [0, 1, 4])
def test_every_format_can_be_read_again(
    generate: Any, effects: Any, context: Any, level: int
) -> None:
    result = result_of(generate(grid_level=level, output_formats=FORMATS))

    assert (result["vertices"], result["faces"]) == (30 * 4**level + 2, 60 * 4**level)
    assert result["watertight"] is True
    assert [file["format"] for file in result["files"]] == FORMATS
    for file in result["files"]:
        path = context().open_artifact(file["sha256"])
        assert hashlib.sha256(path.read_bytes()).hexdigest() == file["sha256"]
        assert path.stat().st_size == file["bytes"]
        assert file["path"] is None
        mesh: Any = trimesh.load(path, file_type=file["format"], force="mesh")
        assert len(mesh.faces) == result["faces"]
        mesh.merge_vertices()
        assert mesh.is_watertight
        assert mesh.bounds == pytest.approx(np.array([[-1, -1, -1], [1, 1, 1]]), abs=0.1)
    assert effects.progress[-1] == (100, "4 files")


def test_the_same_request_makes_the_same_files(generate: Any) -> None:
    first, second = (
        result_of(generate(grid_level=2, output_formats=FORMATS))["files"] for _ in range(2)
    )
    assert first == second


def test_files_may_also_go_to_the_workers_disk(generate: Any, disk: Path) -> None:
    result = result_of(generate(grid_level=1, output_formats=["obj"], output_dir="new/meshes"))

    path = disk / "new" / "meshes" / "dodecahedron-level1.obj"
    assert result["files"][0]["path"] == str(path)
    assert path.stat().st_size == result["files"][0]["bytes"]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_directory_out_of_place_is_rejected(generate: Any, disk: Path) -> None:
    (disk / "file").touch()
    for output_dir in ("/etc", "file", "file/below"):
        outcome = generate(output_dir=output_dir)
        assert outcome.error.kind == "rejected"
        assert outcome.error.message.startswith("payload.output_dir: ")


def test_it_can_be_cancelled(generate: Any, effects: Any) -> None:
    effects.cancel_after = 3
    assert generate(grid_level=7).outcome is Outcome.CANCELLED
    assert effects.artifacts == []


@pytest.mark.parametrize(
    "payload",
    [
        {"grid_level": -1},
        {"grid_level": 8},
        {"grid_level": "4"},
        {"grid_level": 4.0},
        {"output_formats": []},
        {"output_formats": ["fbx"]},
        {"output_formats": ["glb", "glb"]},
        {"output_dir": "../x"},
        {"level": 4},
    ],
)
def test_a_payload_is_refused_early(registry: Registry, payload: dict[str, object]) -> None:
    with pytest.raises(InvalidPayload) as caught:
        registry.get("qegg.generate").validate_payload(payload)
    assert caught.value.problems[0][0].startswith(f"payload.{next(iter(payload))}")
