//! VQA accuracy: agreement with ten annotators (`spec/evaluation.md` §6).

use super::normalise;

/// The accuracy of one reply, 0 to 1: over every annotator left out in turn, the mean of
/// min(1, agreeing others / 3). 0 without annotators.
pub fn accuracy<S: AsRef<str>>(reply: &str, answers: &[S]) -> f64 {
    let reply = normalise::vqa(reply);
    let agrees: Vec<bool> = answers.iter().map(|answer| normalise::vqa(answer.as_ref()) == reply).collect();
    let agreeing = agrees.iter().filter(|&&agrees| agrees).count();
    let left_out = agrees.iter().map(|&own| (agreeing - usize::from(own)) as f64 / 3.0);
    left_out.map(|share| share.min(1.0)).sum::<f64>() / answers.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_agrees_with_himself() {
        assert_eq!(accuracy("yes", &["yes", "no", "no", "no"]), 0.25);
        assert_eq!(accuracy("no", &["no", "no", "no", "no"]), 1.0);
        assert_eq!(accuracy::<&str>("yes", &[]), 0.0);
    }
}
