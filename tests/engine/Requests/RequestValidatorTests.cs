using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>The limits of a request: values just allowed, and values just not allowed with the field that is reported.</summary>
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
            (s_good with { MaxTokens = 41 }, "MaxTokens"),
            (s_good with { MaxTokens = int.MaxValue }, "MaxTokens"),
            (s_good with { MaxTokens = -1, MinTokens = -1 }, "MaxTokens MinTokens"),
            (s_good with { MaxTokens = -1, PromptLogProbs = true }, "MaxTokens"),
            (s_good with { MaxTokens = 1, Prompt = new int[Context] }, "MaxTokens"),
            (s_good with { MaxTokens = 0 }, "MaxTokens"),
            (s_good with { MaxTokens = 0, PromptLogProbs = true, N = 2 }, "N"),
            (s_good with { MinTokens = 41 }, "MinTokens"),
            (s_good with { MinTokens = -1 }, "MinTokens"),
            (s_good with { Prompt = [] }, "Prompt"),
            (s_good with { Prompt = new int[Context + 1] }, "Prompt"),
            (s_good with { Prompt = new int[Context + 1], MaxTokens = 0, PromptLogProbs = true }, "Prompt"),
            (s_good with { Prompt = new int[Context], MaxTokens = null }, "Prompt"),
            (s_good with { Prompt = [0, Vocabulary] }, "Prompt[1]"),
            (s_good with { Prompt = [-1] }, "Prompt[0]"),
            (s_good with { N = 0 }, "N"),
            (s_good with { N = RequestValidator.MaxN + 1 }, "N"),
            (s_good with { Temperature = float.NaN }, "Temperature"),
            (s_good with { Temperature = float.PositiveInfinity }, "Temperature"),
            (s_good with { Temperature = -float.Epsilon }, "Temperature"),
            (s_good with { TopK = -1 }, "TopK"),
            (s_good with { TopP = 0 }, "TopP"),
            (s_good with { TopP = float.NaN }, "TopP"),
            (s_good with { TopP = MathF.BitIncrement(1) }, "TopP"),
            (s_good with { MinP = float.NaN }, "MinP"),
            (s_good with { MinP = -float.Epsilon }, "MinP"),
            (s_good with { MinP = MathF.BitIncrement(1) }, "MinP"),
            (s_good with { LogitBias = new Dictionary<int, float> { [3] = float.NaN } }, "LogitBias[3]"),
            (s_good with { LogitBias = new Dictionary<int, float> { [3] = float.PositiveInfinity } }, "LogitBias[3]"),
            (s_good with { LogitBias = new Dictionary<int, float> { [Vocabulary] = 1 } }, "LogitBias[0]"),
            (s_good with { StopTokenIds = [5, Vocabulary] }, "StopTokenIds[1]"),
            (s_good with { StopTokenIds = new int[65] }, "StopTokenIds"),
            (s_good with { StopStrings = [new string('x', 1025)] }, "StopStrings"),
            (s_good with { StopStrings = ["x", ""] }, "StopStrings"),
            (s_good with { StopStrings = [.. Enumerable.Repeat("x", 65)] }, "StopStrings"),
            (s_good with { TopLogProbs = RequestValidator.MaxTop + 1 }, "TopLogProbs"),
            (s_good with { TopLogProbs = -1 }, "TopLogProbs"),
            (s_good with { PromptLogProbs = true, PromptTop = RequestValidator.MaxTop + 1 }, "PromptTop"),
            (s_good with { PromptLogProbs = true, PromptTop = -1 }, "PromptTop"),
            (s_good with { PromptTop = 1 }, "PromptTop"),
            (s_good with { MaxStaleness = -1 }, "MaxStaleness"),
            (s_good with { Id = "" }, "Id"),
            (s_good with { Id = new string('x', 257) }, "Id"),
        ];
        foreach ((GroupRequest bad, string fields) in cases)
            Assert.Equal(fields, string.Join(' ', s_validator.Validate(bad).Select(problem => problem.Field).Distinct()));

        // More biases than a step may hold, in a vocabulary that has as many tokens.
        RequestValidator large = new(5000, Context, hasTokenizer: true);
        GroupRequest Biased(int count) => s_good with { LogitBias = Enumerable.Range(0, count).ToDictionary(id => id, _ => 1f) };
        Assert.Empty(large.Validate(Biased(4096)));
        Assert.Equal("LogitBias", Assert.Single(large.Validate(Biased(4097))).Field);

        // A prompt of another tokenizer: the first token that is wrong, not all of them.
        Assert.Equal("Prompt[1]", Assert.Single(s_validator.Validate(s_good with { Prompt = [1, 9999, -1, 9999] })).Field);

        IReadOnlyList<Problem> few = new RequestValidator(50, Context, hasTokenizer: true).Validate(
            s_good with { PromptLogProbs = true, TopLogProbs = 51, PromptTop = 51 });
        Assert.Equal(["TopLogProbs", "PromptTop"], few.Select(problem => problem.Field)); // no more alternatives than tokens
        Assert.Equal("StopStrings", Assert.Single(new RequestValidator(50, Context, hasTokenizer: false)
            .Validate(s_good with { StopStrings = ["x"] })).Field);
    }

    /// <summary>A problem reads in the engine's names, and in those of a surface that calls fields otherwise.</summary>
    [Fact]
    public void A_problem_is_told_in_any_forms_names()
    {
        (GroupRequest Bad, string Told, string Renamed)[] cases =
        [
            (s_good with { MaxTokens = 0 }, "MaxTokens: 0 makes sense only with PromptLogProbs",
                "<MaxTokens>: 0 makes sense only with (PromptLogProbs)"),
            (s_good with { MaxTokens = 0, PromptLogProbs = true, N = 2 }, "N: must be 1 when MaxTokens is 0",
                "<N>: must be 1 when (MaxTokens) is 0"),
            (s_good with { MinTokens = 41 }, "MinTokens: 41 is more than MaxTokens 40", "<MinTokens>: 41 is more than (MaxTokens) 40"),
            (s_good with { PromptTop = 1 }, "PromptTop: needs PromptLogProbs", "<PromptTop>: needs (PromptLogProbs)"),
            (s_good with { Prompt = [0, -1] }, $"Prompt[1]: token -1 is outside the vocabulary of {Vocabulary}",
                $"<Prompt>[1]: token -1 is outside the vocabulary of {Vocabulary}"),
        ];
        foreach ((GroupRequest bad, string told, string renamed) in cases)
        {
            Problem problem = Assert.Single(s_validator.Validate(bad));
            Assert.Equal(told, problem.ToString());
            Assert.Equal(renamed, problem.Rename(field => $"<{field}>", other => $"({other})").ToString());
        }
    }
}
