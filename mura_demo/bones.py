"""Bones of the demo radiographs: triangle meshes become point clouds of bone mineral.

Reads the meshes of the installed `myo-sim` package (MyoSim, Apache-2.0) and writes only the cloud cache.
Nothing here knows about joints, findings or films.  Explained in the appendix
`a_demo_radiographs`.

All lengths are millimetres.  A bone's local frame is that of its body in the model: x anterior, y up (so a
hanging arm points to -y), z to the right.  Only right bones exist; left films are mirrored later.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

CARPALS = [
    *("scaphoid", "lunate", "triquetrum", "pisiform"),
    *("trapezium", "trapezoid", "capitate", "hamate"),
]
METACARPALS = [f"{i}mc" for i in range(1, 6)]
PROXIMAL = ["thumbprox", *(f"{i}proxph" for i in range(2, 6))]
MIDDLE = [f"{i}midph" for i in range(2, 6)]
DISTAL = ["thumbdist", *(f"{i}distph" for i in range(2, 6))]

FLAT = {"scapula", "thorax"}  # no shaft, hence no marrow canal
LOW_POLY = {"humerus", "radius", "ulna", "clavicle"}  # coarse meshes with holes: closed harder, smoothed more


class Tissue(NamedTuple):
    """How a bone is filled, in mm: the thickness of its cortex mid-shaft, the smoothing of its mesh."""

    cortex: float
    smooth: float | None = None


TISSUE = {
    "humerus": Tissue(3.6, 2.0),
    "radius": Tissue(2.7, 1.6),
    "ulna": Tissue(2.7, 1.6),
    "clavicle": Tissue(1.8, 1.6),
    "scapula": Tissue(1.1, 0.7),
    "thorax": Tissue(0.8, 1.2),
    **dict.fromkeys(CARPALS, Tissue(0.7)),
    **dict.fromkeys(METACARPALS, Tissue(1.6)),
    **dict.fromkeys(PROXIMAL, Tissue(1.25)),
    **dict.fromkeys(MIDDLE, Tissue(1.0)),
    **dict.fromkeys(DISTAL, Tissue(0.7)),
}


class Cloud(NamedTuple):
    """A bone as N jittered points, one per voxel, each carrying the mineral of its voxel.

    points: (N, 3) float32, mm, local frame.  mass: (N,) float32, mm^3 of solid cortical bone.
    depth: (N,) float32, mm below the surface.  along: (N,) float32, from the proximal (0) to the distal (1)
    end of the whole bone.  grain: (N,) float32, its trabeculae, of unit variance.  pitch: voxel edge in mm.
    """

    points: np.ndarray
    mass: np.ndarray
    depth: np.ndarray
    along: np.ndarray
    grain: np.ndarray
    pitch: float

    @classmethod
    def of(cls, columns: list[np.ndarray], pitch: float) -> Cloud:
        """Make a cloud of its five columns, whatever their type and layout in memory."""
        points, mass, depth, along, grain = (np.ascontiguousarray(c, np.float32) for c in columns)
        return cls(points, mass, depth, along, grain, pitch)


def models_folder() -> Path:
    """Find the folder of MyoSim's models; raises FileNotFoundError, with the remedy, where there is none."""
    spec = importlib.util.find_spec("myo_sim")  # found, not imported: importing it would load MuJoCo
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("The demo films need the bone meshes of myo-sim: pip install myo-sim")
    return Path(spec.submodule_search_locations[0]) / "models"


def read_stl(path: Path) -> np.ndarray:
    """Read a mesh.

    Parameters
    ----------
    path : Path
        A binary STL file, in metres.

    Returns
    -------
    ndarray (T, 3, 3) float64
        Corners of the triangles, in mm.

    Raises
    ------
    ValueError
        The file is not whole.
    """
    raw = np.fromfile(path, np.uint8)
    count = int(raw[80:84].view("<u4")[0]) if len(raw) >= 84 else -1
    if count < 1 or len(raw) != 84 + 50 * count:
        raise ValueError(f"{path} is not a whole binary STL file: reinstall the package myo-sim")
    records = np.ascontiguousarray(raw[84:].reshape(-1, 50)[:, 12:48])
    return records.view("<f4").reshape(-1, 3, 3).astype(np.float64) * 1000


def close_mesh(triangles: np.ndarray) -> np.ndarray:
    """Add a fan from every connected set of open edges to its centroid: enough for voxels, never drawn."""
    vertices, corner = np.unique(triangles.reshape(-1, 3).round(2), axis=0, return_inverse=True)
    corner = corner.reshape(-1, 3)
    edges = np.sort(np.concatenate([corner[:, [0, 1]], corner[:, [1, 2]], corner[:, [2, 0]]]), axis=1)
    edges, times = np.unique(edges[edges[:, 0] != edges[:, 1]], axis=0, return_counts=True)
    edges = edges[times == 1]
    if not len(edges):
        return triangles
    graph = coo_array((np.ones(len(edges)), edges.T), shape=(len(vertices),) * 2)
    hole = connected_components(graph, directed=False)[1][edges[:, 0]]
    centre = {h: vertices[np.unique(edges[hole == h])].mean(0) for h in np.unique(hole)}
    fan = np.stack([vertices[edges[:, 0]], vertices[edges[:, 1]], [centre[h] for h in hole]], axis=1)
    return np.concatenate([triangles, fan])


def surface_samples(triangles: np.ndarray, step: float, rng: np.random.Generator) -> np.ndarray:
    """Spread points evenly over a surface, about six per step^2, and on every corner: (M, 3) in mm."""
    a, b, c = triangles[:, 0], triangles[:, 1], triangles[:, 2]
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2
    i = np.repeat(np.arange(len(area)), rng.poisson(area * 6 / step**2) + 1)
    u, v = rng.random((2, len(i)))
    fold = u + v > 1
    u[fold], v[fold] = 1 - u[fold], 1 - v[fold]
    inner = a[i] + u[:, None] * (b - a)[i] + v[:, None] * (c - a)[i]
    return np.concatenate([inner, triangles.reshape(-1, 3)])


def solidify(
    triangles: np.ndarray, pitch: float, bone: str, window: tuple[float, float], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Find the voxels inside a mesh that may have holes.

    Parameters
    ----------
    triangles : ndarray (T, 3, 3)
        In mm.
    pitch : float
        Edge of a voxel, mm.
    bone : str
        Thin and coarse bones are treated differently.
    window : tuple of float
        The stretch of y (mm) that is worked out, with a margin for the filters.
    rng : numpy.random.Generator

    Returns
    -------
    inside : ndarray (X, Y, Z) bool
    low : ndarray (3,)
        Corner of the grid, mm.

    Notes
    -----
    A plain 3-D fill leaks through every gap, so 2-D slices along the three axes are filled and vote.
    """
    samples = surface_samples(close_mesh(triangles), pitch, rng)
    margin = 8 * pitch + 4
    samples = samples[(samples[:, 1] > window[0] - margin) & (samples[:, 1] < window[1] + margin)]
    low = samples.min(0) - 6 * pitch
    shape = tuple(np.ceil((samples.max(0) - low) / pitch).astype(int) + 6)
    shell = np.zeros(shape, bool)
    shell[tuple(((samples - low) / pitch).astype(int).T)] = True
    shell = ndimage.binary_closing(shell, iterations=2)
    votes = fill_slices(shell, 0) + fill_slices(shell, 1) + fill_slices(shell, 2)
    filled = fill_pockets(votes >= 2)
    if bone in LOW_POLY:
        filled = fill_pockets(ndimage.binary_closing(filled, iterations=2))
    smooth = TISSUE[bone].smooth or max(0.45, pitch)
    soft = ndimage.gaussian_filter(filled.astype(np.float32), smooth / pitch, truncate=3)
    thin_sheet = (
        filled & (soft > 0.25) if bone in FLAT else False
    )  # smoothing must not eat the shoulder blade
    return (soft > 0.5) | thin_sheet, low


def fill_slices(solid: np.ndarray, axis: int) -> np.ndarray:
    """Fill the outline in every 2-D slice across `axis`: (X, Y, Z) uint8, 1 inside."""
    slices = np.ascontiguousarray(np.moveaxis(solid, axis, 0)).astype(np.uint8)
    for image in slices:
        if image.any():
            outlines, _ = cv2.findContours(image, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
            cv2.drawContours(image, outlines, -1, 1, cv2.FILLED)
    return np.moveaxis(slices, 0, axis)


def fill_pockets(solid: np.ndarray) -> np.ndarray:
    """Fill whatever the outside cannot reach; the grid's corner is outside."""
    regions = np.empty(solid.shape, np.int32)
    ndimage.label(~solid, output=regions)
    return regions != regions[0, 0, 0]


def trabeculae(shape: tuple[int, ...], bone: str, pitch: float, rng: np.random.Generator) -> np.ndarray:
    """Make smooth noise of unit variance: fine lines along the shaft (local y) of long bones, else a mesh."""
    total = np.zeros(shape, np.float32)
    for width in (0.45, 0.9):  # mm
        long = width if bone in FLAT or bone in CARPALS else 5 * width
        sigma = [max(0.6, s / pitch) for s in (width, long, width)]
        noise = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma, truncate=3)
        total += noise / noise.std()
    return total / np.sqrt(2)


def mineral(
    bone: str, depth: np.ndarray, along: np.ndarray, grain: np.ndarray, cortex: float = 1, spongy: float = 1
) -> np.ndarray:
    """Fill a bone: compact cortex, spongy ends, an almost empty canal along the shaft.

    Parameters
    ----------
    bone : str
        A key of `TISSUE`.
    depth, along, grain : ndarray (N,)
        As in `Cloud`.
    cortex, spongy : float
        The patient's thickness of cortex and amount of spongy bone, as multiples of the usual ones.

    Returns
    -------
    ndarray (N,)
        Density, 1 in solid cortical bone.
    """
    shaft = np.zeros_like(along) if bone in FLAT else 1 - np.abs(2 * along - 1) ** 4
    thick = TISSUE[bone].cortex * (0.25 + 0.75 * shaft) * np.float32(cortex)
    shell = 1 / (1 + np.exp(np.clip((depth - thick) / (0.18 * thick + 0.12), -30, 30)))
    coarse = 0.22 / max(spongy, 0.3)  # fewer trabeculae stand out more
    inner = np.clip(0.34 - 0.27 * shaft**0.7 + coarse * grain * (1 - 0.75 * shaft), 0.02, 1) * spongy
    density = shell * (0.80 + 0.2 * shaft) + (1 - shell) * inner
    return density


def build_cloud(bone: str, pitch: float, window: tuple[float, float]) -> Cloud:
    """Fill a bone with mineral.

    Parameters
    ----------
    bone : str
        Name of its mesh.
    pitch : float
        Edge of a voxel, mm.
    window : tuple of float
        The stretch of local y (mm) to keep, for parts that need one end of a long bone only.

    Returns
    -------
    Cloud
    """
    rng = np.random.default_rng(list(bone.encode()))
    if bone == "thorax":
        return ribs(pitch, rng)
    triangles = read_stl(models_folder() / "meshes" / f"{bone}.stl")
    inside, low = solidify(triangles, pitch, bone, window, rng)
    depth = np.asarray(ndimage.distance_transform_edt(inside), np.float32) * pitch - 0.5 * pitch
    inside = depth > 0.25 * pitch  # the rasterised surface stands half a voxel proud of the true one
    voxels = np.argwhere(inside)
    depth = depth[inside]
    points = low + (voxels + rng.random(voxels.shape)) * pitch  # jitter: a bare grid would show as moire
    along = long_axis_position(points, triangles.reshape(-1, 3))
    grain = trabeculae(inside.shape, bone, pitch, rng)[inside]
    mass = mineral(bone, depth, along, grain) * pitch**3
    keep = (points[:, 1] > window[0]) & (points[:, 1] < window[1])
    return Cloud.of([column[keep] for column in (points, mass, depth, along, grain)], pitch)


def ribs(pitch: float, rng: np.random.Generator) -> Cloud:
    """Bend eight flat, hollow ribs about the half of the chest beside the arm.

    The mesh of the thorax is too coarse for them. They lie on a widening egg that has the mesh's size, run
    down from the spine, and end where cartilage begins. Parameters and result as in `build_cloud`.
    """
    parts = []
    for k in range(8):
        wide = 0.42 + 0.58 * np.sqrt(k / 7)  # of the chest at this rib
        count = int(3.2 * 300 * wide * 34 / pitch**2)
        turn = np.deg2rad(rng.uniform(-75, 205, count))  # 0: to the front, 90: to the side
        ring = rng.uniform(0, 2 * np.pi, count)
        tall, flat = 6.2 * np.sin(ring), 2.6 * np.cos(ring)  # of the rib's section, mm
        shell = rng.uniform(0.75, 1, count)
        out = 1 + flat * shell / (95 * wide)
        x, z = -12 + 92 * wide * out * np.cos(turn), 128 * wide * out * np.sin(turn)
        y = 22 - 29 * k - 24 * wide * (1 + np.cos(turn)) + tall * shell
        parts.append(np.column_stack([x, y, z])[z > -40])
    points = np.concatenate(parts).astype(np.float32)
    ones = np.ones(len(points), np.float32)
    mass = ones * np.float32(0.11 * pitch**3)
    return Cloud(points, mass, 0.3 * ones, 0.5 * ones, 0 * ones, pitch)


def long_axis_position(points: np.ndarray, mesh: np.ndarray) -> np.ndarray:
    """Locate each point along the principal axis of the whole bone, 0 (upper end) to 1 (lower end): (N,)."""
    centre = mesh.mean(0)
    axis = np.linalg.eigh(np.cov((mesh - centre).T))[1][:, -1]
    axis = -axis if axis[1] > 0 else axis
    ends = (mesh - centre) @ axis
    return np.clip(((points - centre) @ axis - ends.min()) / np.ptp(ends), 0, 1)


CloudKey = tuple[str, float, tuple[float, float]]


def load_clouds(keys: list[CloudKey], folder: Path) -> dict[CloudKey, Cloud]:
    """Load clouds; they are built on first use.

    Parameters
    ----------
    keys : list of (bone, pitch, window)
        As `build_cloud` takes them.
    folder : Path
        Where they are kept, a file each, below a folder for each version of this module's source: unlike the
        data's recipe, which is raised by hand, no half-edited bone may stay in the way.

    Returns
    -------
    dict
        `Cloud` by key.
    """
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:10]
    folder = folder / version
    folder.mkdir(parents=True, exist_ok=True)

    def load(key: CloudKey) -> Cloud:
        file = folder / (hashlib.sha256(repr(key).encode()).hexdigest()[:16] + ".npy")
        return _read_cloud(file, key[1]) or _build_cloud_file(file, key)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(keys, pool.map(load, keys), strict=True))


def _read_cloud(file: Path, pitch: float) -> Cloud | None:
    """Read the cloud in a file; None where there is none, or a damaged one."""
    try:
        table = np.load(file)
    except (FileNotFoundError, ValueError, EOFError):
        return None
    return Cloud.of([table[:, :3], *table[:, 3:].T], pitch)


def _build_cloud_file(file: Path, key: CloudKey) -> Cloud:
    """Build a cloud and keep it: a file beside its place, then renamed."""
    cloud = build_cloud(*key)
    np.save(content := io.BytesIO(), np.column_stack(cloud[:5]))
    beside = file.with_suffix(f".{os.getpid()}.tmp")
    beside.write_bytes(content.getvalue())  # NumPy itself would not say that a disk is full
    beside.replace(file)
    return cloud
