using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>The borders of a request: what is just allowed, and what is just not and under which field that is reported.</summary>
public sealed class RequestValidatorTests
{
    private const int Vocabulary = 2000;
    private const int Context = 100;

    private static readonly GroupRequest s_good = new() { Id = "a", Prompt = new int[60], MaxTokens = 40 };

    private static readonly RequestValidator s_validator = new(Vocabulary, Context, hasTokenizer: true);

    [Fact]
    public void What_is_just_allowed_passes()
    {
        GroupRequest[] good =
        [
            s_good, // fills the context
            s_good with { MinTokens = 40 },
            s_good with { N = RequestValidator.MaxN },
            s_good with { MaxTokens = null, Prompt = new int[Context - 1] },
            s_good with { MaxTokens = 0, Prompt = new int[Context], PromptLogProbs = true, PromptTop = RequestValidator.MaxTop },
            s_good with { Prompt = [0, Vocabulary - 1] },
            s_good with { Temperature = 0, TopP = float.Epsilon, MinP = 1 },
            s_good with { TopP = 1, MinP = 0, TopK = int.MaxValue },
            s_good with { LogitBias = new Dictionary<int, float> { [0] = float.NegativeInfinity, [Vocabulary - 1] = float.MaxValue } },
            s_good with { LogitBias = Enumerable.Range(0, 2000).ToDictionary(id => id, _ => 1f) },
            s_good with { StopTokenIds = [0, Vocabulary - 1], StopStrings = [new string('x', 1024), "x"] },
            s_good with { StopTokenIds = new int[64], StopStrings = [.. Enumerable.Repeat("x", 64)] },
            s_good with { TopLogProbs = RequestValidator.MaxTop },
            s_good with { MaxStaleness = 0 },
            s_good with { Id = new string('x', 256) },
        ];
        Assert.All(good, request => Assert.Empty(s_validator.Validate(request)));
        Assert.Empty(new RequestValidator(50, Context, hasTokenizer: false).Validate(
            s_good with { MaxTokens = 0, PromptLogProbs = true, TopLogProbs = 50, PromptTop = 50 }));
    }

    [Fact]
    public void What_is_just_not_allowed_is_named()
    {
        (GroupRequest Bad, string Fields)[] cases =
        [
            (s_good with { MaxTokens = 41 }, "stopping.max_tokens"),
            (s_good with { MaxTokens = int.MaxValue }, "stopping.max_tokens"),
            (s_good with { MaxTokens = -1, MinTokens = -1 }, "stopping.max_tokens stopping.min_tokens"),
            (s_good with { MaxTokens = 0 }, "stopping.max_tokens"),
            (s_good with { MaxTokens = 0, PromptLogProbs = true, N = 2 }, "n"),
            (s_good with { MinTokens = 41 }, "stopping.min_tokens"),
            (s_good with { MinTokens = -1 }, "stopping.min_tokens"),
            (s_good with { Prompt = [] }, "prompt_ids"),
            (s_good with { Prompt = new int[Context + 1] }, "prompt_ids"),
            (s_good with { Prompt = new int[Context + 1], MaxTokens = 0, PromptLogProbs = true }, "prompt_ids"),
            (s_good with { Prompt = new int[Context], MaxTokens = null }, "prompt_ids"),
            (s_good with { Prompt = [0, Vocabulary] }, "prompt_ids[1]"),
            (s_good with { Prompt = [-1] }, "prompt_ids[0]"),
            (s_good with { N = 0 }, "n"),
            (s_good with { N = RequestValidator.MaxN + 1 }, "n"),
            (s_good with { Temperature = float.NaN }, "sampling.temperature"),
            (s_good with { Temperature = float.PositiveInfinity }, "sampling.temperature"),
            (s_good with { Temperature = -float.Epsilon }, "sampling.temperature"),
            (s_good with { TopK = -1 }, "sampling.top_k"),
            (s_good with { TopP = 0 }, "sampling.top_p"),
            (s_good with { TopP = float.NaN }, "sampling.top_p"),
            (s_good with { TopP = MathF.BitIncrement(1) }, "sampling.top_p"),
            (s_good with { MinP = float.NaN }, "sampling.min_p"),
            (s_good with { MinP = -float.Epsilon }, "sampling.min_p"),
            (s_good with { MinP = MathF.BitIncrement(1) }, "sampling.min_p"),
            (s_good with { LogitBias = new Dictionary<int, float> { [3] = float.NaN } }, "sampling.logit_bias[3]"),
            (s_good with { LogitBias = new Dictionary<int, float> { [3] = float.PositiveInfinity } }, "sampling.logit_bias[3]"),
            (s_good with { LogitBias = new Dictionary<int, float> { [Vocabulary] = 1 } }, "sampling.logit_bias[0]"),
            (s_good with { StopTokenIds = [5, Vocabulary] }, "stopping.stop_token_ids[1]"),
            (s_good with { StopTokenIds = new int[65] }, "stopping.stop_token_ids"),
            (s_good with { StopStrings = [new string('x', 1025)] }, "stopping.stop_strings"),
            (s_good with { StopStrings = ["x", ""] }, "stopping.stop_strings"),
            (s_good with { StopStrings = [.. Enumerable.Repeat("x", 65)] }, "stopping.stop_strings"),
            (s_good with { TopLogProbs = RequestValidator.MaxTop + 1 }, "top_logprobs"),
            (s_good with { TopLogProbs = -1 }, "top_logprobs"),
            (s_good with { PromptLogProbs = true, PromptTop = RequestValidator.MaxTop + 1 }, "top"),
            (s_good with { PromptLogProbs = true, PromptTop = -1 }, "top"),
            (s_good with { PromptTop = 1 }, "top"),
            (s_good with { MaxStaleness = -1 }, "max_staleness"),
            (s_good with { Id = "" }, "request_id"),
            (s_good with { Id = new string('x', 257) }, "request_id"),
        ];
        foreach ((GroupRequest bad, string fields) in cases)
            Assert.Equal(fields, string.Join(' ', s_validator.Validate(bad).Select(problem => problem.Field).Distinct()));

        // More biases than a step may hold, in a vocabulary that has as many tokens.
        RequestValidator large = new(5000, Context, hasTokenizer: true);
        GroupRequest Biased(int count) => s_good with { LogitBias = Enumerable.Range(0, count).ToDictionary(id => id, _ => 1f) };
        Assert.Empty(large.Validate(Biased(4096)));
        Assert.Equal("sampling.logit_bias", Assert.Single(large.Validate(Biased(4097))).Field);

        // A prompt of another tokenizer: the first token that is wrong, not all of them.
        Assert.Equal("prompt_ids[1]", Assert.Single(s_validator.Validate(s_good with { Prompt = [1, 9999, -1, 9999] })).Field);

        IReadOnlyList<Problem> few = new RequestValidator(50, Context, hasTokenizer: true).Validate(
            s_good with { PromptLogProbs = true, TopLogProbs = 51, PromptTop = 51 });
        Assert.Equal(["top_logprobs", "top"], few.Select(problem => problem.Field)); // no more alternatives than tokens
        Assert.Equal("stopping.stop_strings", Assert.Single(new RequestValidator(50, Context, hasTokenizer: false)
            .Validate(s_good with { StopStrings = ["x"] })).Field);
    }
}
