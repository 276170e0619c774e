//! What an answer cost, as OpenAI's clients read it.

use serde::Serialize;
use types::Usage;
use utoipa::ToSchema;

/// Tokens of a request.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
pub(crate) struct WireUsage {
    /// Tokens of the prompts, each counted once.
    prompt_tokens: u64,
    /// Tokens of all answers.
    completion_tokens: u64,
    /// Both.
    total_tokens: u64,
    /// More about the prompts.
    prompt_tokens_details: PromptDetails,
}

/// More about the prompts' tokens.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
pub(crate) struct PromptDetails {
    /// Tokens whose work was saved by the prefix cache.
    cached_tokens: u64,
}

impl WireUsage {
    /// The sum over answers, `n` to a prompt.
    pub(crate) fn of(answers: &[Usage], n: usize) -> Self {
        let prompts = || answers.chunks(n.max(1)).filter_map(<[Usage]>::first);
        let prompt_tokens = prompts().map(|usage| u64::from(usage.prompt_tokens)).sum();
        let cached_tokens = prompts().map(|usage| u64::from(usage.cached_tokens)).sum();
        let completion_tokens = answers.iter().map(|usage| u64::from(usage.completion_tokens)).sum();
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: PromptDetails { cached_tokens },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_count_once() {
        let answer =
            |prompt_tokens, completion_tokens| Usage { prompt_tokens, cached_tokens: 1, completion_tokens };
        let usage = WireUsage::of(&[answer(5, 1), answer(5, 2), answer(7, 3), answer(7, 4)], 2);
        assert_eq!((usage.prompt_tokens, usage.completion_tokens, usage.total_tokens), (12, 10, 22));
        assert_eq!(usage.prompt_tokens_details.cached_tokens, 2);
    }
}
