//! How each benchmark puts its questions (`spec/evaluation.md` §6).

use flmm_data::qa::{Benchmark, Question};

/// What asks for a short answer.
pub const SHORT: &str = "\nAnswer the question using a single word or phrase.";
/// What asks for an option's letter.
pub const LETTER: &str = "\nAnswer with the option's letter from the given choices directly.";
/// What MME's own questions end with; [`SHORT`] takes its place.
const MME_ENDING: &str = " Please answer yes or no.";

/// The prompt of a question.
pub fn prompt(benchmark: Benchmark, question: &Question) -> String {
    let text = &question.question;
    match benchmark {
        Benchmark::Mme => text.trim().replace(MME_ENDING, "") + SHORT,
        Benchmark::Pope | Benchmark::Gqa | Benchmark::VqaV2 => format!("{text}{SHORT}"),
        Benchmark::Ai2d => format!("{text}{}{LETTER}", listed(&question.options)),
        Benchmark::MmBench if question.hint.is_empty() => {
            format!("{text}{}{LETTER}", listed(&question.options))
        }
        Benchmark::MmBench => format!("{}\n{text}{}{LETTER}", question.hint, listed(&question.options)),
        Benchmark::MmVet | Benchmark::LlavaBench => text.clone(),
    }
}

fn listed(options: &[(char, String)]) -> String {
    options.iter().map(|(letter, text)| format!("\n{letter}. {text}")).collect()
}

/// Most tokens of a reply.
pub fn most_tokens(benchmark: Benchmark) -> usize {
    match benchmark {
        Benchmark::Mme | Benchmark::Gqa | Benchmark::VqaV2 | Benchmark::Ai2d => 16,
        Benchmark::Pope => 128,
        Benchmark::MmBench => 256,
        Benchmark::MmVet | Benchmark::LlavaBench => 1024,
    }
}
