"""Plates, nails, wires, screws, anchors, staples and cerclage as clouds of metal that follow a bone.

Knows nothing of scenes; `hardware.py` chooses and places what is made here.  Each maker takes a `Seat` and
returns a list of (points (N, 3) in mm, volume (N,) in mm^3).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.ndimage import uniform_filter1d
from scipy.spatial import KDTree

from .sites import Site, unit

Metal = list[tuple[np.ndarray, np.ndarray]]


class Seat(NamedTuple):
    """Where an implant goes: the site, the bone's points and their depth, and how finely to fill (mm)."""

    site: Site
    points: np.ndarray  # (N, 3), of the bone
    depth: np.ndarray  # (N,), below its surface
    step: float
    severity: float
    rng: np.random.Generator

    def frame(self) -> np.ndarray:
        """Make axes (3, 3) at the site: columns outwards in a random direction, along the bone, sideways."""
        x = unit(np.cross(self.site.axis, self.rng.standard_normal(3)))
        return np.stack([x, self.site.axis, np.cross(x, self.site.axis)], axis=1)


def tube(path: np.ndarray, radius: float, step: float, thread: float = 0) -> tuple[np.ndarray, np.ndarray]:
    """Fill a tube along a path evenly.

    Parameters
    ----------
    path : ndarray (M, 3)
        In mm.
    radius : float
        In mm, of the thread's ridge where there is one.
    step : float
        Distance of the points, mm.
    thread : float
        Pitch of a thread, mm; 0 for none.

    Returns
    -------
    points : ndarray (N, 3)
    volume : ndarray (N,)
    """
    pieces = np.diff(path, axis=0)
    ends = np.concatenate([[0], np.cumsum(np.linalg.norm(pieces, axis=1))])
    volume = np.pi * radius**2 * ends[-1]
    count = int(np.clip(volume / step**3, 60, 40_000))
    i = np.arange(count)
    at = (i + 0.5) / count * ends[-1]
    piece = np.clip(np.searchsorted(ends, at, side="right") - 1, 0, len(pieces) - 1)
    across, other = _normals(pieces)
    r, angle = radius * np.sqrt(i * 0.7548776662 % 1), 2 * np.pi * (i * 0.5698402910 % 1)  # an even filling
    middle = np.stack([np.interp(at, ends, path[:, k]) for k in range(3)], axis=1)
    points = (
        middle + (r * np.cos(angle))[:, None] * across[piece] + (r * np.sin(angle))[:, None] * other[piece]
    )
    if thread:
        solid = (r < 0.68 * radius) | ((at / thread + angle / (2 * np.pi)) % 1 < 0.45)
        return points[solid], np.full(solid.sum(), volume / count)
    return points, np.full(count, volume / count)


def _normals(pieces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two unit vectors across each piece of a path, (M, 3) both."""
    along = pieces / np.linalg.norm(pieces, axis=1, keepdims=True)
    thin = np.eye(3)[np.abs(along).argmin(1)]
    across = np.cross(along, thin)
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    return across, np.cross(along, across)


def inside(
    points: np.ndarray, origin: np.ndarray, direction: np.ndarray, radius: float
) -> tuple[float, float]:
    """Follow a line both ways through a bone, to where it leaves it: two distances from `origin` in mm.

    `radius` is how far from the line a point of the bone still counts, mm.  (0, 0) where none does.
    """
    r = points - origin
    s = r @ direction
    s = np.sort(s[(r**2).sum(1) - s**2 < radius**2])
    if not len(s):
        return 0.0, 0.0
    gap = np.flatnonzero(np.diff(s) > 4)
    start, end = np.concatenate([[0], gap + 1]), np.concatenate([gap, [len(s) - 1]])
    best = np.argmin(np.abs((s[start] + s[end]) / 2))
    return float(s[start[best]]), float(s[end[best]])


def screw(seat: Seat, head: np.ndarray, direction: np.ndarray, radius: float) -> Metal:
    """Drive a screw from its head through both cortices; its tip stands 1 to 2 mm proud."""
    low, far = inside(seat.points, head, direction, max(1.2, 2 * seat.step))
    if far - max(low, 0) < 2 * radius:  # beside the bone
        return []
    tip = far + seat.rng.uniform(0.8, 1.8)
    shank = tube(np.array([head, head + direction * tip]), radius, seat.step, thread=max(1.0, 1.1 * radius))
    cap = np.array([head - direction * 0.8 * radius, head + direction * 0.3 * radius])
    return [shank, tube(cap, 1.75 * radius, seat.step)]


def _surface(seat: Seat, frame: np.ndarray, long: float, wide: float):
    """Sample the surface under a strip: where along it, how far out, how far sideways; (V,) each."""
    r = (seat.points - seat.site.centre) @ frame
    size = min(2.0, long / 8)
    edges = np.arange(-long / 2, long / 2 + size, size)
    bin_of = np.digitize(r[:, 1], edges) - 1
    valid = (bin_of >= 0) & (bin_of < len(edges) - 1)
    r, bin_of, bins = r[valid], bin_of[valid], len(edges) - 1
    count = np.bincount(bin_of, minlength=bins)
    side = np.bincount(bin_of, r[:, 2], bins) / np.maximum(count, 1)
    under = np.abs(r[:, 2] - side[bin_of]) < 0.4 * wide
    out = np.full(bins, -np.inf)
    np.maximum.at(out, bin_of[under], r[under, 0])
    there = np.isfinite(out) & (count > 3)
    v = (edges[:-1] + size / 2)[there]
    return (
        v,
        uniform_filter1d(out[there], 5, mode="nearest"),
        uniform_filter1d(side[there], 7, mode="nearest"),
    )


def _bed(seat: Seat, long: float, wide: float):
    """Find a bed for a plate on a random side: frame, what `_surface` samples (smooth), unevenness in mm."""
    frame = seat.frame()
    v, out, side = _surface(seat, frame, long, wide)
    v, out, side = (row[out > 0.55 * np.median(out)] for row in (v, out, side))  # a bone's end falls away
    if len(v) < 5:
        return frame, v, out, side, np.inf
    curve = np.polynomial.Polynomial.fit(v, out, 3)(v)  # a plate is stiff: it bridges what is hollow
    side = np.polynomial.Polynomial.fit(v, side, 2)(v)
    return frame, v, curve + np.quantile(out - curve, 0.8), side, (out - curve).std() + 0.1 * np.ptp(curve)


def plate(seat: Seat) -> Metal:
    """Bend a plate to the cortex and screw it on; it has a hole for each screw, and some stay empty."""
    rng, width = seat.rng, seat.site.width
    long = seat.site.length * rng.uniform(0.22, 0.4) * (0.75 + 0.4 * seat.severity)
    long = np.clip(long, 2.0 * width, 0.7 * seat.site.length)
    thick, wide = np.clip(0.1 * width, 0.8, 2.6), np.clip(0.42 * width, 2.4, 9.5)
    frame, v, out, side, _ = min((_bed(seat, long, wide) for _ in range(3)), key=lambda bed: bed[4])
    if len(v) < 5:
        return []
    long, middle = v[-1] - v[0], (v[-1] + v[0]) / 2
    holes = int(np.clip(long / (1.25 * wide), 2, 10))
    spots = (np.arange(holes) - (holes - 1) / 2) * long / holes + middle
    extent = np.array([thick, long, wide])
    grid = np.maximum(2, np.ceil(extent / seat.step)).astype(int)
    metal = (np.indices(tuple(grid)).reshape(3, -1).T + rng.random((grid.prod(), 3))) / grid - 0.5
    metal = metal * extent + [0, middle, 0]
    from_hole = np.abs(metal[:, 1, None] - spots).min(1)
    waist = wide / 2 * (0.84 + 0.16 * np.cos(np.pi * np.clip(2 * from_hole / (long / holes), 0, 1)) ** 2)
    solid = (from_hole**2 + metal[:, 2] ** 2 > (0.27 * wide) ** 2) & (np.abs(metal[:, 2]) < waist)
    metal = metal[solid]

    def bend(u, w, along):
        local = [np.interp(along, v, out) + thick / 2 + u, along, np.interp(along, v, side) + w]
        return np.stack(local, axis=-1) @ frame.T + seat.site.centre

    parts = [(bend(metal[:, 0], metal[:, 2], metal[:, 1]), np.full(len(metal), extent.prod() / grid.prod()))]
    for spot in spots[rng.random(holes) > 0.35]:
        aim = unit(-frame[:, 0] + 0.07 * rng.standard_normal(3))
        parts += screw(seat, bend(thick / 2, 0.0, spot), aim, float(np.clip(0.085 * width, 0.6, 2.0)))
    return parts


def nail(seat: Seat) -> Metal:
    """Slide a nail down the canal, and lock it with screws across the bone near both of its ends."""
    site, rng = seat.site, seat.rng
    along = (seat.points - site.centre) @ site.axis
    low, high = np.quantile(along, [0.04, rng.uniform(0.78, 0.93)])
    edges = np.arange(low, high, 4.0)
    bin_of = np.digitize(along, edges)
    count = np.maximum(np.bincount(bin_of, minlength=len(edges) + 1), 1)
    middle = np.stack([np.bincount(bin_of, c, len(edges) + 1) / count for c in seat.points.T], axis=1)[1:-1]
    path = uniform_filter1d(middle, 11, axis=0, mode="nearest")
    half = np.array([seat.depth[bin_of == k].max(initial=0) for k in range(1, len(edges))])
    radius = float(np.clip(0.42 * np.quantile(half, 0.1), 0.9, 4.5))
    parts = [tube(path, radius, 1.5 * seat.step)]
    for at in (3, 6, len(path) - 4):
        aim = unit(np.cross(site.axis, rng.standard_normal(3)))
        start = inside(seat.points, path[at], -aim, max(1.2, 2 * seat.step))[1]
        parts += screw(seat, path[at] - aim * start, aim, float(np.clip(0.4 * radius, 0.5, 2.2)))
    return parts


def wires(seat: Seat) -> Metal:
    """Drill 2 or 3 K-wires obliquely through the bone; their outer ends are cut, or bent, just outside it."""
    rng, width, parts = seat.rng, seat.site.width, []
    radius = float(np.clip(0.035 * width + 0.35, 0.5, 0.95))
    for _ in range(rng.integers(2, 4)):
        aside = unit(np.cross(seat.site.axis, rng.standard_normal(3)))
        aim = unit(rng.choice([-1, 1]) * seat.site.axis + rng.uniform(0.15, 0.5) * aside)
        origin = seat.site.centre + 0.12 * width * rng.standard_normal(3)
        low, high = inside(seat.points, origin, aim, max(1.0, 2 * seat.step))
        low = max(low, high - 7 * width)
        path = [origin + aim * (high + 0.8), origin + aim * (low - 1.5)]
        if rng.random() < 0.4:
            path.append(path[-1] + 2.5 * unit(rng.choice([-1, 1]) * aside - 0.3 * aim))
        parts.append(tube(np.array(path), radius, seat.step))
    return parts


def screws(seat: Seat) -> Metal:
    """Drive 1 to 3 lag screws obliquely through the bone."""
    rng, width, site, parts = seat.rng, seat.site.width, seat.site, []
    aside = unit(np.cross(site.axis, rng.standard_normal(3)))
    number = rng.integers(1, 4)
    for k in range(number):
        aim = unit(aside + rng.uniform(-0.35, 0.35) * site.axis + 0.1 * rng.standard_normal(3))
        middle = site.centre + site.axis * (k - (number - 1) / 2) * 0.55 * width
        start = inside(seat.points, middle, -aim, max(1.2, 2 * seat.step))[1]
        parts += screw(seat, middle - aim * start, aim, float(np.clip(0.085 * width, 0.6, 2.2)))
    return parts


def headless(seat: Seat) -> Metal:
    """Sink one headless compression screw along the bone: a thread at both ends, a thin shank between."""
    aim = unit(seat.site.axis + 0.12 * seat.rng.standard_normal(3))
    low, high = inside(seat.points, seat.site.centre, aim, max(1.0, 2 * seat.step))
    low, high = low + 0.1 * (high - low), high - 0.1 * (high - low)
    ends = [seat.site.centre + aim * (low + f * (high - low)) for f in (0, 0.35, 0.65, 1)]
    radius = float(np.clip(0.09 * seat.site.width, 0.8, 1.7))
    first, shank, last = (np.array(ends[k : k + 2]) for k in range(3))
    threads = [tube(piece, radius, seat.step, thread=1.1) for piece in (first, last)]
    return [*threads, tube(shank, 0.62 * radius, seat.step)]


def cerclage(seat: Seat, loops: int = 0) -> Metal:
    """Tie 1 to 3 loops of wire around the bone, each with a twisted knot; or exactly `loops`."""
    rng, site, parts = seat.rng, seat.site, []
    frame, number = seat.frame(), loops or rng.integers(1, 4)
    angles = np.linspace(0, 2 * np.pi, 49)
    for k in range(number):
        slant = rng.normal(0, 0.12, 2)
        r = (seat.points - site.centre) @ frame - [0, (k - (number - 1) / 2) * 0.6 * site.width, 0]
        level = r[:, 1] - r[:, 0] * slant[0] - r[:, 2] * slant[1]
        r = r[np.abs(level) < 1.5 + seat.step]
        if len(r) < 20:
            continue
        hub = r.mean(0)
        beside = (r - hub)[:, [0, 2]] @ np.stack([np.cos(angles), np.sin(angles)])
        radius = uniform_filter1d(beside.max(0)[:-1], 5, mode="wrap")[np.r_[0:48, 0]] + 0.3
        ring = np.stack([radius * np.cos(angles), 0 * angles, radius * np.sin(angles)], axis=1) + hub
        ring[:, 1] += (ring[:, 0] - hub[0]) * slant[0] + (ring[:, 2] - hub[2]) * slant[1]
        knot = ring[0] + np.array([[0, 0, 0], [0.6, 4, 0]])
        back = site.centre + frame[:, 1] * (k - (number - 1) / 2) * 0.6 * site.width
        for path, thick in ((ring, 0.55), (knot, 1.0)):
            parts.append(tube(path @ frame.T + back, thick, min(seat.step, 0.6), thread=1.2 * (thick == 1)))
    return parts


def tension_band(seat: Seat) -> Metal:
    """Two parallel wires along the bone, and a loop around the bone."""
    rng, site = seat.rng, seat.site
    aside, parts = unit(np.cross(site.axis, rng.standard_normal(3))), []
    aim = unit(site.axis + rng.normal(0, 0.12) * np.cross(site.axis, aside))
    for sign in (-1, 1):
        origin = site.centre + sign * 0.14 * site.width * aside
        low, high = inside(seat.points, origin, aim, max(1.0, 2 * seat.step))
        high = min(high + 0.5, low + 3.2 * site.width)
        parts.append(tube(np.array([origin + aim * (low - 2), origin + aim * high]), 0.9, seat.step))
    distal = site._replace(centre=site.centre + 0.5 * site.width * site.axis)
    return parts + cerclage(seat._replace(site=distal), 1)


def anchors(seat: Seat) -> Metal:
    """Sink 2 to 4 threaded anchors into the outer side of the head of the humerus."""
    rng, parts = seat.rng, []
    for _ in range(rng.integers(2, 4)):
        out = unit(np.array([0.3, 0.55, 0.85]) + 0.3 * rng.standard_normal(3))
        start = seat.site.centre + 6 * rng.standard_normal(3)
        rim = inside(seat.points, start, out, 2.0)[1]
        path = np.array([start + out * (rim - 1.5), start + out * (rim - rng.uniform(11, 15))])
        parts.append(tube(path, rng.uniform(1.5, 2.1), seat.step, thread=1.9))
    return parts


def staples(seat: Seat) -> Metal:
    """Hammer 1 or 2 staples into the surface: two legs in the bone, a bridge on it."""
    rng, parts = seat.rng, []
    for k in range(rng.integers(1, 3)):
        frame = seat.frame()
        half, deep = 0.5 * np.clip(0.5 * seat.site.width, 5, 13), np.clip(0.45 * seat.site.width, 4, 14)
        v, out, side = _surface(seat, frame, 2 * half + 6, 4)
        if len(v) < 3:
            continue
        corners = [(-half, -deep), (-half, 0.6), (half, 0.6), (half, -deep)]
        path = [
            [np.interp(at, v, out) + up, at + k * 0.3 * half, np.interp(at, v, side)] for at, up in corners
        ]
        parts.append(tube(np.array(path) @ frame.T + seat.site.centre, 0.9, seat.step))
    return parts


IMPLANTS = {
    "plate": plate,
    "nail": nail,
    "wires": wires,
    "screws": screws,
    "headless screw": headless,
    "cerclage": cerclage,
    "tension band": tension_band,
    "anchors": anchors,
    "staples": staples,
}


def clip(parts: Metal, bone: np.ndarray, limit: float) -> Metal:
    """Leave out metal that lies further than `limit` mm from the points (N, 3) of a bone."""
    tree, kept = KDTree(bone), []
    for points, volume in parts:
        distance = tree.query(points, distance_upper_bound=limit, eps=0.3)[0]
        near = np.isfinite(np.asarray(distance))
        if near.sum() > 20:
            kept.append((points[near], volume[near]))
    return kept
