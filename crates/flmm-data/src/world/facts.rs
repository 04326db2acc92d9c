//! What is true in a scene, decided from the visible masks with margins: yes, no, or too close to say.

use super::catalog::{Level, StuffClass, stuff_classes};
use super::paint::{Object, Painted, StuffRegion};
use super::text::SegmentRef;

/// A judgement with a margin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Truth {
    Yes,
    No,
    Unclear,
}

/// A spatial relation between two objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Relation {
    Left,
    Right,
    Above,
    Below,
}

impl Relation {
    pub(super) const ALL: [Self; 4] = [Self::Left, Self::Right, Self::Above, Self::Below];

    /// The words between two nouns.
    pub(super) fn words(self) -> &'static str {
        match self {
            Self::Left => "to the left of",
            Self::Right => "to the right of",
            Self::Above => "above",
            Self::Below => "below",
        }
    }

    pub(super) fn opposite(self) -> Self {
        match self {
            Self::Left => Self::Right,
            Self::Right => Self::Left,
            Self::Above => Self::Below,
            Self::Below => Self::Above,
        }
    }
}

/// One of nine places of the picture: column and row, each 0, 1 or 2.
pub(super) type Cell = (usize, usize);

/// The words for a place, indexed by row and column.
pub(super) const PLACES: [[&str; 3]; 3] = [
    ["in the top left", "at the top", "in the top right"],
    ["on the left", "in the middle", "on the right"],
    ["in the bottom left", "at the bottom", "in the bottom right"],
];

/// Number words from zero to six.
pub(super) const NUMBERS: [&str; 7] = ["no", "one", "two", "three", "four", "five", "six"];

/// Centres must differ by this share of the shorter side before a relation is stated.
const CLEAR_DISTANCE: f64 = 0.12;
/// … and a relation is denied only when they differ by less than this in its direction, or
const NO_DISTANCE: f64 = 0.03;
/// … its axis must dominate by this factor.
const DOMINANCE: f64 = 1.3;
/// Distance from a line between thirds below which a place is not stated, as a share of the picture.
const PLACE_MARGIN: f64 = 0.035;
/// Areas must differ by this factor before sizes are compared.
const SIZE_RATIO: f64 = 1.3;
/// "Behind" is said when this share of the hidden object is covered.
const BEHIND_SHARE: f64 = 0.08;

/// A scene and what can be decided about it.
pub(super) struct Facts<'a> {
    pub(super) level: Level,
    pub(super) objects: &'a [Object],
    pub(super) stuff: &'a [StuffRegion],
    covered: &'a [Vec<u32>],
    width: f64,
    height: f64,
}

impl<'a> Facts<'a> {
    pub(super) fn new(painted: &'a Painted, level: Level) -> Self {
        let (width, height) = (f64::from(painted.image.width()), f64::from(painted.image.height()));
        Self {
            level,
            objects: &painted.objects,
            stuff: &painted.stuff,
            covered: &painted.covered,
            width,
            height,
        }
    }

    /// All object indices.
    pub(super) fn all(&self) -> std::ops::Range<usize> {
        0..self.objects.len()
    }

    /// All indices but one.
    pub(super) fn others(&self, index: usize) -> impl Iterator<Item = usize> + '_ {
        self.all().filter(move |&other| other != index)
    }

    /// Centre of the visible box, pixels.
    pub(super) fn centre(&self, index: usize) -> (f64, f64) {
        let [x, y, w, h] = self.objects[index].bbox.map(f64::from);
        (x + w / 2.0, y + h / 2.0)
    }

    /// The class name.
    pub(super) fn noun(&self, index: usize) -> &'static str {
        self.objects[index].class().name
    }

    /// The name an observer gives: colour, where the class has named ones, and class. "red car", "dog".
    pub(super) fn name(&self, index: usize) -> String {
        match self.objects[index].colour {
            Some(colour) => format!("{} {}", colour.name(), self.noun(index)),
            None => self.noun(index).to_owned(),
        }
    }

    /// The plural of [`Self::name`].
    pub(super) fn names(&self, index: usize) -> String {
        let plural = self.objects[index].class().plural;
        match self.objects[index].colour {
            Some(colour) => format!("{} {plural}", colour.name()),
            None => plural.to_owned(),
        }
    }

    /// Objects of the same class, itself included.
    pub(super) fn same_class(&self, index: usize) -> Vec<usize> {
        self.all().filter(|&other| self.objects[other].class == self.objects[index].class).collect()
    }

    /// Objects with the same name, itself included.
    pub(super) fn same_name(&self, index: usize) -> Vec<usize> {
        let same = self.same_class(index).into_iter();
        same.filter(|&other| self.objects[other].colour == self.objects[index].colour).collect()
    }

    /// Whether no other object has its class.
    pub(super) fn unique_class(&self, index: usize) -> bool {
        self.same_class(index).len() == 1
    }

    /// Whether no other object has its name.
    pub(super) fn unique_name(&self, index: usize) -> bool {
        self.same_name(index).len() == 1
    }

    /// Groups of equally named objects, from left to right by their leftmost centre; with whether that order is
    /// clear.
    pub(super) fn groups(&self) -> (Vec<Vec<usize>>, bool) {
        let mut groups: Vec<Vec<usize>> = Vec::new();
        for index in self.all() {
            if self.same_name(index)[0] == index {
                groups.push(self.same_name(index));
            }
        }
        let key = |group: &[usize]| group.iter().map(|&i| self.centre(i).0).fold(f64::INFINITY, f64::min);
        groups.sort_by(|a, b| key(a).total_cmp(&key(b)));
        let gap = 0.06 * self.width.min(self.height);
        let clear = groups.windows(2).all(|pair| key(&pair[1]) - key(&pair[0]) >= gap);
        (groups, clear)
    }

    /// Whether `a` is left of (right of, above, below) `b`.
    pub(super) fn related(&self, a: usize, relation: Relation, b: usize) -> Truth {
        let side = self.width.min(self.height);
        let ((ax, ay), (bx, by)) = (self.centre(a), self.centre(b));
        let (dx, dy) = ((bx - ax) / side, (by - ay) / side);
        let (along, across) = match relation {
            Relation::Left => (dx, dy.abs()),
            Relation::Right => (-dx, dy.abs()),
            Relation::Above => (dy, dx.abs()),
            Relation::Below => (-dy, dx.abs()),
        };
        if along >= CLEAR_DISTANCE && along >= DOMINANCE * across {
            Truth::Yes
        } else if along <= NO_DISTANCE || along < 0.5 * across {
            Truth::No
        } else {
            Truth::Unclear
        }
    }

    /// The relation that clearly holds between `a` and `b`, if any.
    pub(super) fn relation(&self, a: usize, b: usize) -> Option<Relation> {
        Relation::ALL.into_iter().find(|&relation| self.related(a, relation, b) == Truth::Yes)
    }

    /// The place of an object's centre, where it is clear.
    pub(super) fn cell(&self, index: usize) -> Option<Cell> {
        let (x, y) = self.centre(index);
        Some((third(x / self.width)?, third(y / self.height)?))
    }

    /// Whether an object is at a place of the picture, as an observer understands the question "What is … ?":
    /// a corner or the middle means both column and row, an edge means all of that side.
    pub(super) fn at_place(&self, index: usize, (column, row): Cell) -> Truth {
        let (x, y) = self.centre(index);
        let (in_column, in_row) = (in_third(x / self.width, column), in_third(y / self.height, row));
        match (column, row) {
            (0 | 2, 1) => in_column,
            (1, 0 | 2) => in_row,
            _ if in_column == Truth::No || in_row == Truth::No => Truth::No,
            _ if in_column == Truth::Yes && in_row == Truth::Yes => Truth::Yes,
            _ => Truth::Unclear,
        }
    }

    /// Whether `a` is clearly larger than `b`: in visible area, and its box does not say otherwise.
    pub(super) fn larger(&self, a: usize, b: usize) -> bool {
        let (a, b) = (&self.objects[a], &self.objects[b]);
        f64::from(a.area) > SIZE_RATIO * f64::from(b.area) && a.bbox[2] * a.bbox[3] >= b.bbox[2] * b.bbox[3]
    }

    /// The only member of `among` that clearly exceeds all others by this judgement.
    pub(super) fn extreme(&self, among: &[usize], exceeds: impl Fn(usize, usize) -> bool) -> Option<usize> {
        among.iter().copied().find(|&a| among.iter().all(|&b| a == b || exceeds(a, b)))
    }

    /// Whether `a` lies behind `b`.
    pub(super) fn behind(&self, a: usize, b: usize) -> Truth {
        let hidden = f64::from(self.covered[a][b]);
        if hidden >= BEHIND_SHARE * f64::from(self.objects[a].full_area) {
            Truth::Yes
        } else if hidden == 0.0 {
            Truth::No
        } else {
            Truth::Unclear
        }
    }

    /// The only one of `candidates` for which the judgement is yes, provided that it is no for all others.
    pub(super) fn only(
        &self,
        candidates: impl Iterator<Item = usize>,
        judge: impl Fn(usize) -> Truth,
    ) -> Option<usize> {
        match self.matches(candidates, judge)?.as_slice() {
            [only] => Some(*only),
            _ => None,
        }
    }

    /// All candidates for which the judgement is yes; `None` if any is too close to say.
    pub(super) fn matches(
        &self,
        candidates: impl Iterator<Item = usize>,
        judge: impl Fn(usize) -> Truth,
    ) -> Option<Vec<usize>> {
        let mut found = Vec::new();
        for candidate in candidates {
            match judge(candidate) {
                Truth::Yes => found.push(candidate),
                Truth::No => {}
                Truth::Unclear => return None,
            }
        }
        Some(found)
    }

    /// The class of a stuff region.
    pub(super) fn stuff_class(&self, region: usize) -> &'static StuffClass {
        &stuff_classes()[self.stuff[region].class]
    }
}

/// Links to objects.
pub(super) fn objects(indices: &[usize]) -> Vec<SegmentRef> {
    indices.iter().map(|&index| SegmentRef::Object(index)).collect()
}

/// The third of 0..1 that clearly holds `t`.
fn third(t: f64) -> Option<usize> {
    (0..3).find(|&k| in_third(t, k) == Truth::Yes)
}

fn in_third(t: f64, k: usize) -> Truth {
    let low = if k == 0 { -1.0 } else { k as f64 / 3.0 };
    let high = if k == 2 { 2.0 } else { (k + 1) as f64 / 3.0 };
    if t >= low + PLACE_MARGIN && t <= high - PLACE_MARGIN {
        Truth::Yes
    } else if t < low - PLACE_MARGIN || t > high + PLACE_MARGIN {
        Truth::No
    } else {
        Truth::Unclear
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thirds_have_margins() {
        assert_eq!(third(0.1), Some(0));
        assert_eq!(third(0.33), None);
        assert_eq!(third(0.5), Some(1));
        assert_eq!(third(0.99), Some(2));
        assert_eq!(in_third(0.32, 1), Truth::Unclear);
        assert_eq!(in_third(0.25, 1), Truth::No);
    }
}
