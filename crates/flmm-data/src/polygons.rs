//! Polygons on the pixel grid: filling as OpenCV's `polylines` + `fillPoly` do (`evaluation.md` §3), and the way back
//! from a mask to such polygons.
//!
//! The rule is that of OpenCV 4.8 to 4.10, with which the recorded masks were made. Versions before and after give other
//! pixels at slanted sides, one or two in a polygon.

use crate::mask::Mask;

/// A pixel, or a point outside the picture.
type Point = (i64, i64);

/// Fixed-point bits of an edge's x.
const SHIFT: u32 = 16;

/// Fills a closed polygon and draws its outline one pixel wide. Corners are truncated towards zero.
pub fn fill(points: &[[f64; 2]], width: u32, height: u32) -> Mask {
    let corners: Vec<Point> = points.iter().map(|&[x, y]| (truncate(x), truncate(y))).collect();
    let mut mask = Mask { width, height, data: vec![false; width as usize * height as usize] };
    let mut edges = Vec::new();
    let Some(&last) = corners.last() else { return mask };
    let mut from = last;
    for &to in &corners {
        line(&mut mask, from, to);
        edges.extend(edge(&mask, from, to));
        from = to;
    }
    scan(&mut mask, edges);
    mask
}

/// As the reference casts to 32-bit integers; coordinates far outside are held where sums cannot overflow.
fn truncate(value: f64) -> i64 {
    (value as i64).clamp(-(1 << 24), 1 << 24)
}

/// Marks the pixels of a segment: Bresenham from its left end, after clipping to the picture.
fn line(mask: &mut Mask, a: Point, b: Point) {
    let Some((mut a, mut b)) = clip(mask, a, b) else { return };
    if b.0 < a.0 {
        (a, b) = (b, a);
    }
    let (dx, dy) = (b.0 - a.0, (b.1 - a.1).abs());
    let step_y = if b.1 < a.1 { -1 } else { 1 };
    let steep = dy > dx;
    let (long, short) = if steep { (dy, dx) } else { (dx, dy) };
    let mut error = long - 2 * short;
    let (mut x, mut y) = a;
    for _ in 0..=long {
        mask.data[y as usize * mask.width as usize + x as usize] = true;
        let both = error < 0;
        error += if both { 2 * long - 2 * short } else { -2 * short };
        if steep || both {
            y += step_y;
        }
        if !steep || both {
            x += 1;
        }
    }
}

/// The part of a segment inside the picture, its ends rounded as OpenCV rounds them.
fn clip(mask: &Mask, mut a: Point, mut b: Point) -> Option<(Point, Point)> {
    let (right, bottom) = (i64::from(mask.width) - 1, i64::from(mask.height) - 1);
    if right < 0 || bottom < 0 {
        return None;
    }
    let outside_x = |p: Point| i32::from(p.0 < 0) + i32::from(p.0 > right) * 2;
    let outside = |p: Point| outside_x(p) + i32::from(p.1 < 0) * 4 + i32::from(p.1 > bottom) * 8;
    let (mut code_a, mut code_b) = (outside(a), outside(b));
    let cut = |numerator: i64, by: i64, over: i64| (numerator as f64 * by as f64 / over as f64) as i64;
    if code_a & code_b == 0 && code_a | code_b != 0 {
        if code_a & 12 != 0 {
            let y = if code_a < 8 { 0 } else { bottom };
            a = (a.0 + cut(y - a.1, b.0 - a.0, b.1 - a.1), y);
            code_a = outside_x(a);
        }
        if code_b & 12 != 0 {
            let y = if code_b < 8 { 0 } else { bottom };
            b = (b.0 + cut(y - b.1, b.0 - a.0, b.1 - a.1), y);
            code_b = outside_x(b);
        }
        if code_a & code_b == 0 && code_a | code_b != 0 {
            if code_a != 0 {
                let x = if code_a == 1 { 0 } else { right };
                a = (x, a.1 + cut(x - a.0, b.1 - a.1, b.0 - a.0));
                code_a = 0;
            }
            if code_b != 0 {
                let x = if code_b == 1 { 0 } else { right };
                b = (x, b.1 + cut(x - b.0, b.1 - a.1, b.0 - a.0));
                code_b = 0;
            }
        }
    }
    (code_a | code_b == 0).then_some((a, b))
}

/// A non-horizontal side: rows y0..y1, x in fixed point at its upper end, change of x per row.
struct Edge {
    y0: i64,
    y1: i64,
    x: i64,
    dx: i64,
}

fn edge(mask: &Mask, a: Point, b: Point) -> Option<Edge> {
    if a.1 == b.1 {
        return None;
    }
    let inside =
        |p: Point| (0..i64::from(mask.width)).contains(&p.0) && (0..i64::from(mask.height)).contains(&p.1);
    // A side inside the picture is moved by half a pixel, so that its x is rounded to the nearest pixel. One that leaves the
    // picture is not; its slope is that of the part inside.
    let (from, to, moved) = match inside(a) && inside(b) {
        true => (a, b, 1 << (SHIFT - 1)),
        false => {
            let (from, to) = clip(mask, a, b).filter(|(from, to)| from.1 != to.1).unwrap_or((a, b));
            (from, to, 0)
        }
    };
    let dx = ((to.0 - from.0) << SHIFT) / (to.1 - from.1);
    let (upper, lower, start) = if a.1 < b.1 { (a, b, from) } else { (b, a, to) };
    Some(Edge { y0: upper.1, y1: lower.1, x: (start.0 << SHIFT) + moved + (upper.1 - start.1) * dx, dx })
}

/// Fills between pairs of sides, row by row.
fn scan(mask: &mut Mask, edges: Vec<Edge>) {
    let rows = 0..i64::from(mask.height);
    for y in rows {
        let mut xs: Vec<i64> = edges
            .iter()
            .filter(|edge| edge.y0 <= y && y < edge.y1)
            .map(|edge| edge.x + (y - edge.y0) * edge.dx)
            .collect();
        xs.sort_unstable();
        for pair in xs.chunks_exact(2) {
            let (x0, x1) = ((pair[0] >> SHIFT).max(0), (pair[1] >> SHIFT).min(i64::from(mask.width) - 1));
            if x0 <= x1 {
                let row = y as usize * mask.width as usize;
                mask.data[row + x0 as usize..=row + x1 as usize].fill(true);
            }
        }
    }
}

/// The outer outline of every 8-connected part of a mask, as corners at pixel centres. Filling them gives the mask
/// back, with holes closed.
pub fn outlines(mask: &Mask) -> Vec<Vec<[f64; 2]>> {
    let inside = |(x, y): Point| x >= 0 && y >= 0 && mask.get(x as u32, y as u32);
    let mut seen = vec![false; mask.data.len()];
    let mut found = Vec::new();
    for y in 0..i64::from(mask.height) {
        for x in 0..i64::from(mask.width) {
            if inside((x, y)) && !seen[y as usize * mask.width as usize + x as usize] {
                flood(mask, (x, y), &mut seen);
                let corners = corners(&trace(&inside, (x, y)));
                found.push(corners.into_iter().map(|(x, y)| [x as f64, y as f64]).collect());
            }
        }
    }
    found
}

/// The eight neighbours, clockwise from the west (y points down).
const AROUND: [Point; 8] = [(-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1), (0, 1), (-1, 1)];

/// Marks the 8-connected part that contains `start`.
fn flood(mask: &Mask, start: Point, seen: &mut [bool]) {
    let index = |(x, y): Point| y as usize * mask.width as usize + x as usize;
    let mut open = vec![start];
    seen[index(start)] = true;
    while let Some((x, y)) = open.pop() {
        for (dx, dy) in AROUND {
            let next = (x + dx, y + dy);
            if next.0 >= 0 && next.1 >= 0 && mask.get(next.0 as u32, next.1 as u32) && !seen[index(next)] {
                seen[index(next)] = true;
                open.push(next);
            }
        }
    }
}

/// Moore neighbour tracing, clockwise from the first pixel in reading order until its first step repeats.
fn trace(inside: &impl Fn(Point) -> bool, start: Point) -> Vec<Point> {
    let mut path = vec![start];
    // The pixel west of the start is outside: it is where the search around the start begins.
    let (mut at, mut back) = (start, 0);
    let mut first = None;
    loop {
        let step =
            (1..=8).map(|k| (back + k) % 8).find(|&k| inside((at.0 + AROUND[k].0, at.1 + AROUND[k].1)));
        let Some(direction) = step else { return path };
        if first == Some((at, direction)) {
            path.pop();
            return path;
        }
        first = first.or(Some((at, direction)));
        at = (at.0 + AROUND[direction].0, at.1 + AROUND[direction].1);
        path.push(at);
        // Continue from the outside pixel that was looked at last, seen from the new place.
        back = if direction % 2 == 0 { (direction + 6) % 8 } else { (direction + 5) % 8 };
    }
}

/// Drops the points of a closed path at which it goes straight on.
fn corners(path: &[Point]) -> Vec<Point> {
    let n = path.len();
    let straight = |i: usize| {
        let (a, b, c) = (path[(i + n - 1) % n], path[i], path[(i + 1) % n]);
        (b.0 - a.0, b.1 - a.1) == (c.0 - b.0, c.1 - b.1)
    };
    let kept: Vec<Point> = (0..n).filter(|&i| n < 3 || !straight(i)).map(|i| path[i]).collect();
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn picture(rows: &[&str]) -> Mask {
        let at = |x: u32, y: u32| rows[y as usize].as_bytes()[x as usize] == b'#';
        Mask::from_fn(rows[0].len() as u32, rows.len() as u32, at)
    }

    #[test]
    fn filling_an_outline_gives_the_shape_back() {
        for rows in [
            &["....", ".#..", "...."][..],
            &["#", "#", "#"],
            &["#...#", ".#.#.", "..#..", "..#.."],
            &["..##..", ".####.", "######", "..##..", "...###"],
            &["#.#", "...", "###"],
            &["##.##", "##.##", "#####"],
        ] {
            let mask = picture(rows);
            let mut filled = Mask { data: vec![false; mask.data.len()], ..mask.clone() };
            for outline in outlines(&mask) {
                let part = fill(&outline, mask.width, mask.height);
                filled.data.iter_mut().zip(&part.data).for_each(|(all, &one)| *all |= one);
            }
            assert_eq!(filled, mask, "{rows:?}");
        }
    }

    #[test]
    fn a_square_includes_its_outline() {
        let mask = fill(&[[1.0, 1.0], [3.9, 1.0], [3.0, 3.0], [1.0, 3.0]], 6, 5);
        assert_eq!((mask.area(), mask.bbox()), (9, [1, 1, 3, 3]));
        assert_eq!(fill(&[], 4, 4).area(), 0);
        assert_eq!(fill(&[[-50.0, -50.0], [90.0, -50.0], [90.0, 90.0], [-50.0, 90.0]], 4, 4).area(), 16);
    }

    proptest! {
        #[test]
        fn outlines_cover_any_mask(width in 1u32..9, height in 1u32..9, bits in any::<u64>()) {
            let mask = Mask::from_fn(width, height, |x, y| bits >> (y * 8 + x).min(63) & 1 == 1);
            let mut filled = vec![false; mask.data.len()];
            for outline in outlines(&mask) {
                let part = fill(&outline, width, height);
                filled.iter_mut().zip(&part.data).for_each(|(all, &one)| *all |= one);
            }
            // Nothing is lost; what is added is enclosed.
            for y in 0..height {
                for x in 0..width {
                    let at = (y * width + x) as usize;
                    prop_assert!(filled[at] || !mask.data[at]);
                    if filled[at] && !mask.data[at] {
                        prop_assert!((0..x).any(|x| mask.get(x, y)) && (x + 1..width).any(|x| mask.get(x, y)));
                        prop_assert!((0..y).any(|y| mask.get(x, y)) && (y + 1..height).any(|y| mask.get(x, y)));
                    }
                }
            }
        }
    }
}
