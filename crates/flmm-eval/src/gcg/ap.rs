//! COCO's mask average precision for one category, from IoUs at hand.
//!
//! The same numbers as `pycocotools` with `iouType = "segm"`, but nothing of a picture is kept except its IoUs, areas and
//! scores.

use serde::{Deserialize, Serialize};

/// What average precision needs to know of one picture.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Detections {
    /// `[predicted][true]`.
    pub ious: Vec<Vec<f64>>,
    /// Pixels of every predicted mask.
    pub predicted_areas: Vec<f64>,
    /// Pixels of every true mask.
    pub true_areas: Vec<f64>,
    /// Confidence of every predicted mask; empty: all the same, so that the order counts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub scores: Vec<f64>,
}

/// COCO's twelve numbers, fractions; −1 where there is nothing to find.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CocoStats(pub [f64; 12]);

impl CocoStats {
    /// Average precision at IoU 0.5.
    pub fn ap50(&self) -> f64 {
        self.0[1]
    }
}

/// At most so many predictions of a picture count.
const MOST: usize = 100;
const THRESHOLDS: usize = 10;
const RECALLS: usize = 101;

/// Areas that count, in pixels: all, small, medium, large.
const AREAS: [(f64, f64); 4] = [(0.0, 1e10), (0.0, 1024.0), (1024.0, 9216.0), (9216.0, 1e10)];

fn threshold(index: usize) -> f64 {
    0.5 + 0.05 * index as f64
}

/// How the predictions of one picture fared at one threshold, in order of their scores.
struct Judged {
    score: f64,
    /// Whether a true mask was found; `None`: the prediction does not count.
    found: Option<bool>,
}

/// The twelve numbers of COCO's summary. The order of `pictures` matters among equal scores.
pub fn coco_stats(pictures: &[Detections]) -> CocoStats {
    let orders: Vec<Vec<usize>> = pictures.iter().map(by_score).collect();
    let evaluate = |area: usize, most: usize| -> Vec<(Vec<f64>, f64)> {
        (0..THRESHOLDS).filter_map(|t| curve(pictures, &orders, threshold(t), AREAS[area], most)).collect()
    };
    let mean = |values: Vec<f64>| match values.is_empty() {
        true => -1.0,
        false => values.iter().sum::<f64>() / values.len() as f64,
    };
    let precision =
        |curves: &[(Vec<f64>, f64)]| mean(curves.iter().flat_map(|(p, _)| p.iter().copied()).collect());
    let recall = |curves: &[(Vec<f64>, f64)]| mean(curves.iter().map(|(_, recall)| *recall).collect());
    let by_area: Vec<_> = (0..AREAS.len()).map(|area| evaluate(area, MOST)).collect();
    let at = |t: usize| by_area[0].get(t).map_or(-1.0, |curve| precision(std::slice::from_ref(curve)));
    CocoStats([
        precision(&by_area[0]),
        at(0),
        at(5),
        precision(&by_area[1]),
        precision(&by_area[2]),
        precision(&by_area[3]),
        recall(&evaluate(0, 1)),
        recall(&evaluate(0, 10)),
        recall(&by_area[0]),
        recall(&by_area[1]),
        recall(&by_area[2]),
        recall(&by_area[3]),
    ])
}

/// The predictions that count, best first, equal ones in their order.
fn by_score(picture: &Detections) -> Vec<usize> {
    let mut order: Vec<usize> = (0..picture.ious.len()).collect();
    order.sort_by(|&a, &b| score(picture, b).total_cmp(&score(picture, a)));
    order.truncate(MOST);
    order
}

fn score(picture: &Detections, predicted: usize) -> f64 {
    picture.scores.get(predicted).copied().unwrap_or(1.0)
}

/// Precision at 101 recalls, and the recall reached. `None` if there is no true mask to find.
fn curve(
    pictures: &[Detections],
    orders: &[Vec<usize>],
    threshold: f64,
    area: (f64, f64),
    most: usize,
) -> Option<(Vec<f64>, f64)> {
    let counts = |pixels: &f64| (area.0..=area.1).contains(pixels);
    let wanted = pictures.iter().flat_map(|p| &p.true_areas).filter(|pixels| counts(pixels)).count();
    if wanted == 0 {
        return None;
    }
    let mut judged: Vec<Judged> = Vec::new();
    for (picture, order) in pictures.iter().zip(orders) {
        let fared = judge(picture, order, threshold, counts);
        judged.extend(fared.into_iter().take(most));
    }
    judged.sort_by(|a, b| b.score.total_cmp(&a.score));
    let (mut found, mut wrong) = (0usize, 0usize);
    let mut points: Vec<(f64, f64)> = judged
        .iter()
        .map(|judged| {
            found += usize::from(judged.found == Some(true));
            wrong += usize::from(judged.found == Some(false));
            let precision = found as f64 / ((found + wrong) as f64 + f64::EPSILON);
            (found as f64 / wanted as f64, precision)
        })
        .collect();
    // Precision never grows with recall.
    for i in (1..points.len()).rev() {
        points[i - 1].1 = points[i - 1].1.max(points[i].1);
    }
    let reached = points.last().map_or(0.0, |(recall, _)| *recall);
    let at = |recall: f64| {
        let place = points.partition_point(|(reached, _)| *reached < recall);
        points.get(place).map_or(0.0, |(_, precision)| *precision)
    };
    // numpy.linspace multiplies by the step.
    let step = 1.0 / (RECALLS - 1) as f64;
    Some(((0..RECALLS).map(|i| at(if i == RECALLS - 1 { 1.0 } else { i as f64 * step })).collect(), reached))
}

/// Every prediction, best first, takes the true mask with the largest IoU that is free; masks of the wanted area go
/// before others.
fn judge(
    picture: &Detections,
    order: &[usize],
    threshold: f64,
    counts: impl Fn(&f64) -> bool,
) -> Vec<Judged> {
    let ignored: Vec<bool> = picture.true_areas.iter().map(|pixels| !counts(pixels)).collect();
    let mut truth: Vec<usize> = (0..ignored.len()).collect();
    truth.sort_by_key(|&t| ignored[t]);
    let mut taken = vec![false; ignored.len()];
    let fare = |&predicted: &usize| {
        let (mut best, mut at) = (threshold.min(1.0 - 1e-10), None);
        for &t in truth.iter().filter(|&&t| !taken[t]) {
            if at.is_some_and(|at: usize| !ignored[at]) && ignored[t] {
                break;
            }
            if picture.ious[predicted][t] >= best {
                (best, at) = (picture.ious[predicted][t], Some(t));
            }
        }
        if let Some(at) = at {
            taken[at] = true;
        }
        let found = match at {
            Some(at) if ignored[at] => None,
            Some(_) => Some(true),
            None => counts(&picture.predicted_areas[predicted]).then_some(false),
        };
        Judged { score: score(picture, predicted), found }
    };
    order.iter().map(fare).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_to_find_is_minus_one_and_nothing_found_is_zero() {
        assert_eq!(coco_stats(&[]).0, [-1.0; 12]);
        let missed = Detections { true_areas: vec![50.0], ..Detections::default() };
        assert_eq!(coco_stats(&[missed]).ap50(), 0.0);
        let found = Detections {
            ious: vec![vec![1.0]],
            predicted_areas: vec![50.0],
            true_areas: vec![50.0],
            scores: Vec::new(),
        };
        assert!((coco_stats(&[found]).ap50() - 1.0).abs() < 1e-12);
    }
}
