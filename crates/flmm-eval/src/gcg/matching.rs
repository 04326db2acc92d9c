//! Which predicted masks belong to which true ones: matched IoU and mask recall (`spec/evaluation.md` §4).

use flmm::Result;

use crate::runs::Runs;

/// Least IoU and least text similarity of a match.
const THRESHOLD: f64 = 0.5;

/// IoU of every mask of `rows` with every mask of `columns`; 0 for two empty masks. An error if the sizes differ.
pub fn ious(rows: &[Runs], columns: &[Runs]) -> Result<Vec<Vec<f64>>> {
    let row = |a: &Runs| columns.iter().map(|b| Ok(a.overlap(b)?.iou())).collect();
    rows.iter().map(row).collect()
}

/// Rows become columns. `width` is the number of columns, which an empty matrix does not tell.
pub fn transposed(matrix: &[Vec<f64>], width: usize) -> Vec<Vec<f64>> {
    (0..width).map(|column| matrix.iter().map(|row| row[column]).collect()).collect()
}

/// IoUs `[true][mask]` and similarities `[true][text]` with the text of every mask in the mask's column: `text_of` says
/// which one it is. Masks without a text come last; texts without a mask are left out, because no mask can mean them.
pub fn side_by_side(
    ious: &[Vec<f64>],
    similarity: &[Vec<f64>],
    text_of: &[Option<usize>],
) -> (Vec<Vec<f64>>, Vec<Vec<f64>>) {
    let with_text = || text_of.iter().enumerate().filter_map(|(mask, text)| Some((mask, (*text)?)));
    let without = || text_of.iter().enumerate().filter(|(_, text)| text.is_none()).map(|(mask, _)| mask);
    let masks =
        |row: &Vec<f64>| with_text().map(|(mask, _)| mask).chain(without()).map(|mask| row[mask]).collect();
    let texts = |row: &Vec<f64>| with_text().map(|(_, text)| row[text]).collect();
    (ious.iter().map(masks).collect(), similarity.iter().map(texts).collect())
}

/// Mean IoU of the pairs that a greedy pairing finds in `ious [predicted][true]`: the largest IoU first, until none above
/// 0 is left. 0 without a pair. Masks without a partner cost nothing.
pub fn matched_iou(ious: &[Vec<f64>]) -> f64 {
    let mut left = ious.to_vec();
    let mut pairs = Vec::new();
    while let Some((row, column, iou)) = largest(&left).filter(|&(_, _, iou)| iou > 0.0) {
        pairs.push(iou);
        strike(&mut left, row, column);
    }
    pairs.iter().sum::<f64>() / pairs.len().max(1) as f64
}

/// Whose procedure counts recalled phrases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// GLaMM's evaluator: a picture whose best mask has no phrase counts as failed, without matches.
    Glamm,
    /// F-LMM's: predictions are first cut to as many as have both a mask and a phrase.
    Flmm,
}

/// Matches `(true phrase, predicted phrase)` of one picture, from `ious [true][predicted mask]` and
/// `similarity [true][predicted phrase]`; `None` for a picture that [`Variant::Glamm`] fails on.
///
/// The pair with the largest IoU is taken as long as both IoU and similarity reach one half. The first pair that does
/// not ends the search for the whole picture, as in the published evaluators.
pub fn recalled(ious: &[Vec<f64>], similarity: &[Vec<f64>], variant: Variant) -> Option<Vec<(usize, usize)>> {
    let phrases = similarity.first().map_or(0, Vec::len);
    let mut left = ious.to_vec();
    if variant == Variant::Flmm {
        left.iter_mut().for_each(|row| row.truncate(phrases));
    }
    let mut alike = similarity.to_vec();
    let mut matches = Vec::new();
    while let Some((row, column, _)) = largest(&left).filter(|&(_, _, iou)| iou >= THRESHOLD) {
        let similar = *alike.get(row)?.get(column)?;
        if similar < THRESHOLD || similar.is_nan() {
            break;
        }
        matches.push((row, column));
        strike(&mut left, row, column);
        strike(&mut alike, row, column);
    }
    Some(matches)
}

/// Row, column and value of the largest entry, the first one among equals.
fn largest(matrix: &[Vec<f64>]) -> Option<(usize, usize, f64)> {
    let entries =
        matrix.iter().enumerate().flat_map(|(r, row)| row.iter().enumerate().map(move |(c, &v)| (r, c, v)));
    entries.filter(|(_, _, v)| !v.is_nan()).reduce(|best, entry| if entry.2 > best.2 { entry } else { best })
}

/// Sets a row and a column to 0.
fn strike(matrix: &mut [Vec<f64>], row: usize, column: usize) {
    matrix[row].fill(0.0);
    for row in matrix {
        if let Some(value) = row.get_mut(column) {
            *value = 0.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_pair_that_fails_ends_the_search() {
        let ious = vec![vec![0.9, 0.1], vec![0.2, 0.8]];
        let all = vec![vec![0.9; 2]; 2];
        assert_eq!(recalled(&ious, &all, Variant::Glamm), Some(vec![(0, 0), (1, 1)]));
        // The best pair does not speak of the same: the second one is not looked at.
        let unlike = vec![vec![0.4, 0.9], vec![0.9, 0.9]];
        assert_eq!(recalled(&ious, &unlike, Variant::Glamm), Some(vec![]));
        assert!((matched_iou(&ious) - 0.85).abs() < 1e-12);
        assert_eq!(matched_iou(&[vec![0.0], vec![0.0]]), 0.0);
        assert_eq!(matched_iou(&[]), 0.0);
    }

    /// Three entries: a text alone, a mask alone, both. The mask of the last one is compared with its own text.
    #[test]
    fn masks_are_compared_with_their_own_texts() {
        let (ious, similarity) = (vec![vec![0.2, 0.9]], vec![vec![0.1, 0.8]]);
        let (ious, similarity) = side_by_side(&ious, &similarity, &[None, Some(1)]);
        assert_eq!((ious.clone(), similarity.clone()), (vec![vec![0.9, 0.2]], vec![vec![0.8]]));
        for variant in [Variant::Glamm, Variant::Flmm] {
            assert_eq!(recalled(&ious, &similarity, variant), Some(vec![(0, 0)]));
        }
        assert_eq!(side_by_side(&[vec![]], &[vec![0.5]], &[]), (vec![vec![]], vec![vec![]]));
    }

    #[test]
    fn a_mask_without_a_phrase_fails_one_evaluator_only() {
        let ious = vec![vec![0.9, 0.0], vec![0.0, 0.8]];
        let one_phrase = vec![vec![0.9], vec![0.1]];
        assert_eq!(recalled(&ious, &one_phrase, Variant::Glamm), None);
        assert_eq!(recalled(&ious, &one_phrase, Variant::Flmm), Some(vec![(0, 0)]));
    }
}
