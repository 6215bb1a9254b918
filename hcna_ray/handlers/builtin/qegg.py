"""``qegg.generate``: a dodecahedron refined into a sphere, exported as mesh files.

An open stand-in. Level 0 is the dodecahedron, each pentagon cut into five triangles at its centre.
From level 1 on the centres lie on the sphere, and each level cuts every triangle into four at the
midpoints of its edges, which are moved out to the sphere. Level *n* has ``60 * 4**n`` faces and
``30 * 4**n + 2`` vertices.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field, field_validator

from hcna_ray.handlers.context import TaskContext
from hcna_ray.handlers.errors import Reject
from hcna_ray.handlers.files import AtomicOutput
from hcna_ray.handlers.paths import OptionalWorkerPath
from hcna_ray.handlers.registry import Payload, task

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Points = NDArray[np.float64]
    Faces = NDArray[np.int64]

MeshFormat = Literal["glb", "obj", "stl", "ply"]
LEVEL_MAX = 7


class GeneratePayload(Payload):
    """How fine a mesh, and in which formats."""

    grid_level: int = Field(default=2, ge=0, le=LEVEL_MAX, description="Rounds of refinement.")
    output_formats: list[MeshFormat] = Field(
        default=["glb"], min_length=1, max_length=4, description="Files to make, each once."
    )
    output_dir: OptionalWorkerPath = Field(
        default=None, description="Directory on the worker to write to as well, made if missing."
    )

    @field_validator("output_formats")
    @classmethod
    def _each_once(cls, formats: list[MeshFormat]) -> list[MeshFormat]:
        if len(set(formats)) != len(formats):
            raise ValueError("must name each format once")
        return formats


class MeshFile(BaseModel):
    """One exported file, stored as an artifact."""

    format: MeshFormat
    sha256: str
    bytes: int
    name: str
    #: Path on the worker, if ``output_dir`` was given.
    path: str | None = None


class GenerateResult(BaseModel):
    """The mesh and its files."""

    grid_level: int
    vertices: int
    faces: int
    #: Whether the surface is closed.
    watertight: bool
    files: list[MeshFile]


@task("qegg.generate", payload=GeneratePayload, result=GenerateResult, stand_in=True)
def generate(payload: GeneratePayload, ctx: TaskContext) -> GenerateResult:
    """Refine a dodecahedron and export it."""
    import trimesh

    directory = _directory(payload, ctx)
    steps = payload.grid_level + len(payload.output_formats) + 1
    points, faces = dodecahedron()
    for level in range(1, payload.grid_level + 1):
        ctx.raise_if_cancelled()
        points, faces = refine(on_sphere(points), faces)
        ctx.progress(100 * level / steps, f"level {level}: {len(faces)} faces")
    mesh = trimesh.Trimesh(vertices=points, faces=faces, process=False)
    files = []
    for index, kind in enumerate(payload.output_formats):
        ctx.raise_if_cancelled()
        ctx.progress(100 * (payload.grid_level + 1 + index) / steps, f"exporting {kind}")
        exported = mesh.export(file_type=kind)
        content = exported.encode() if isinstance(exported, str) else bytes(exported)
        files.append(_store(kind, content, payload.grid_level, directory, ctx))
    ctx.progress(100, f"{len(files)} files")
    return GenerateResult(
        grid_level=payload.grid_level,
        vertices=len(points),
        faces=len(faces),
        watertight=bool(mesh.is_watertight),
        files=files,
    )


def dodecahedron() -> tuple[Points, Faces]:
    """Return the regular dodecahedron, its 12 pentagons cut at their centres.

    Returns:
        Points, shape ``(32, 3)``: 20 corners at distance 1 from the origin, then 12 centres in the
        planes of their pentagons. Triangles, shape ``(60, 3)``, counter-clockwise from outside.
    Source: Coxeter, *Regular Polytopes* (1973), section 3.7.
    """
    import numpy as np

    phi = (1 + 5**0.5) / 2
    corners: list[tuple[float, ...]] = list(product((-1.0, 1.0), repeat=3))
    for a, b in product((-1 / phi, 1 / phi), (-phi, phi)):
        corners += [(0.0, a, b), (a, b, 0.0), (b, 0.0, a)]
    points = np.array(corners) / 3**0.5
    # The centres point the way of an icosahedron's corners, which are the faces of its dual.
    ways = [
        w
        for a, b in product((-1.0, 1.0), (-phi, phi))
        for w in ((0.0, b, a), (b, a, 0.0), (a, 0.0, b))
    ]
    centres, triangles = [], []
    for index, way in enumerate(np.array(ways)):
        normal = way / np.linalg.norm(way)
        ring = np.argsort(points @ normal)[-5:]
        centre = points[ring].mean(axis=0)
        side = points[ring[0]] - centre
        up = np.cross(normal, side)
        angle = np.arctan2((points[ring] - centre) @ up, (points[ring] - centre) @ side)
        ring = ring[np.argsort(angle)]
        centres.append(centre)
        middle = len(points) + index
        triangles += [(middle, ring[i], ring[(i + 1) % 5]) for i in range(5)]
    return np.vstack([points, centres]), np.array(triangles, dtype=np.int64)


def on_sphere(points: Points) -> Points:
    """Return ``points``, shape ``(n, 3)``, moved to distance 1 from the origin."""
    import numpy as np

    moved: Points = points / np.linalg.norm(points, axis=1, keepdims=True)
    return moved


def refine(points: Points, faces: Faces) -> tuple[Points, Faces]:
    """Cut every triangle into four at the midpoints of its edges, moved out to the unit sphere.

    Args:
        points: Shape ``(n, 3)``, on the unit sphere. Not modified.
        faces: Shape ``(m, 3)``, indices into ``points``.

    Returns:
        Points of shape ``(n + e, 3)`` for ``e`` edges, the old ones first; faces of shape
        ``(4 * m, 3)`` with the same orientation.
    """
    import numpy as np

    edges = np.sort(faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    # An edge as one number is much faster to make unique than a row of two.
    keys, where = np.unique(edges[:, 0] * len(points) + edges[:, 1], return_inverse=True)
    ends = np.stack([keys // len(points), keys % len(points)], axis=1)
    middles = on_sphere(points[ends].mean(axis=1))
    ab, bc, ca = (where.reshape(-1, 3) + len(points)).T
    a, b, c = faces.T
    parts = [(a, ab, ca), (ab, b, bc), (ca, bc, c), (ab, bc, ca)]
    cut = np.concatenate([np.stack(part, axis=1) for part in parts])
    return np.vstack([points, middles]), cut


def _directory(payload: GeneratePayload, ctx: TaskContext) -> Path | None:
    if payload.output_dir is None:
        return None
    directory = ctx.resolve(payload.output_dir, field="payload.output_dir")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise Reject(f"payload.output_dir: {str(directory)!r} is not a directory") from None
    except PermissionError:
        raise Reject(f"payload.output_dir: the worker may not make {str(directory)!r}") from None
    return directory


def _store(
    kind: MeshFormat, content: bytes, level: int, directory: Path | None, ctx: TaskContext
) -> MeshFile:
    name = f"dodecahedron-level{level}.{kind}"
    target = (directory or ctx.scratch) / name
    with AtomicOutput(
        target,
        owner=ctx.task_id,
        fence=str(ctx.fence),
        field="payload.output_dir",
        bytes_max=ctx.limits.output_bytes_max,
        reserve_bytes=ctx.limits.disk_reserve_bytes,
    ) as output:
        output.writer.write(content)
    stored = ctx.artifact(target)
    return MeshFile(
        format=kind,
        sha256=stored.sha256,
        bytes=stored.size,
        name=name,
        path=None if directory is None else str(target),
    )
