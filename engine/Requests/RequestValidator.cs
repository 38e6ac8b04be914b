namespace Rollout.Engine;

/// <summary>Finds everything wrong with a request before it enters the engine.</summary>
public sealed class RequestValidator(int vocabSize, int maxContext, bool hasTokenizer)
{
    /// <summary>Most alternatives reported a token.</summary>
    public const int MaxTop = 1024;

    /// <summary>Most samples of a group.</summary>
    public const int MaxN = 16_384;

    private const int MaxStops = 64;
    private const int MaxBiases = 4096;

    /// <summary>All problems, each naming its field as <see cref="GroupRequest"/> does; empty when the request may run.</summary>
    public ProblemList Validate(GroupRequest request)
    {
        ProblemList problems = [];
        void Check(bool good, string field, string message, string other = "")
        {
            if (!good) problems.Add(new Problem(field, message, other));
        }

        void CheckIds(IEnumerable<int> ids, string field)
        {
            int at = 0;
            foreach (int id in ids)
            {
                if ((uint)id >= (uint)vocabSize)
                {
                    // One is enough: a prompt made with another tokenizer would list thousands.
                    problems.Add(new Problem($"{field}[{at}]", $"token {id} is outside the vocabulary of {vocabSize}"));
                    return;
                }

                at++;
            }
        }

        int prompt = request.Prompt.Length;
        Check(prompt > 0, nameof(request.Prompt), "must hold at least one token");
        Check(prompt <= maxContext, nameof(request.Prompt), $"{prompt} tokens do not fit the context of {maxContext}");
        CheckIds(request.Prompt, nameof(request.Prompt));

        Check(request.N is >= 1 and <= MaxN, nameof(request.N), $"must be between 1 and {MaxN}, is {request.N}");
        Check(float.IsFinite(request.Temperature) && request.Temperature >= 0, nameof(request.Temperature),
            $"must be 0 or a positive number, is {request.Temperature}");
        Check(request.TopK >= 0, nameof(request.TopK), $"must not be negative, is {request.TopK}");
        Check(request.TopP is > 0 and <= 1, nameof(request.TopP), $"must be above 0 and at most 1, is {request.TopP}");
        Check(request.MinP is >= 0 and <= 1, nameof(request.MinP), $"must be between 0 and 1, is {request.MinP}");
        Check(request.LogitBias.Count <= MaxBiases, nameof(request.LogitBias),
            $"at most {MaxBiases} entries, has {request.LogitBias.Count}");
        CheckIds(request.LogitBias.Keys, nameof(request.LogitBias));
        foreach ((int id, float bias) in request.LogitBias)
        {
            if (float.IsFinite(bias) || float.IsNegativeInfinity(bias)) continue;
            problems.Add(new($"{nameof(request.LogitBias)}[{id}]", $"must be finite, or negative infinity to forbid, is {bias}"));
            break; // one is enough, as above
        }

        if (request.MaxTokens is { } maxTokens)
        {
            Check(maxTokens >= 0, nameof(request.MaxTokens), $"must not be negative, is {maxTokens}");
            Check(maxTokens > 0 || request.PromptLogProbs, nameof(request.MaxTokens),
                $"0 makes sense only with {Problem.OtherField}", nameof(request.PromptLogProbs));
            Check(maxTokens > 0 || request.N == 1, nameof(request.N),
                $"must be 1 when {Problem.OtherField} is 0", nameof(request.MaxTokens));
            Check((long)prompt + maxTokens <= maxContext || prompt > maxContext, nameof(request.MaxTokens),
                $"{prompt} prompt tokens and {maxTokens} more do not fit the context of {maxContext}");
            Check(request.MinTokens <= Math.Max(maxTokens, 0), nameof(request.MinTokens),
                $"{request.MinTokens} is more than {Problem.OtherField} {maxTokens}", nameof(request.MaxTokens));
        }
        else
        {
            Check(prompt < maxContext, nameof(request.Prompt), $"{prompt} tokens leave no room in the context of {maxContext}");
        }

        Check(request.MinTokens >= 0, nameof(request.MinTokens), $"must not be negative, is {request.MinTokens}");
        Check(request.StopTokenIds.Count <= MaxStops, nameof(request.StopTokenIds),
            $"at most {MaxStops}, has {request.StopTokenIds.Count}");
        CheckIds(request.StopTokenIds, nameof(request.StopTokenIds));
        Check(request.StopStrings.Count <= MaxStops, nameof(request.StopStrings), $"at most {MaxStops}, has {request.StopStrings.Count}");
        Check(request.StopStrings.All(stop => stop.Length is > 0 and <= 1024), nameof(request.StopStrings),
            "each must have 1 to 1024 characters");
        Check(request.StopStrings.Count == 0 || hasTokenizer, nameof(request.StopStrings), "the model has no tokenizer to find them with");
        Check(request.TopLogProbs is >= 0 and <= MaxTop && request.TopLogProbs <= vocabSize, nameof(request.TopLogProbs),
            $"must be between 0 and {Math.Min(MaxTop, vocabSize)}, is {request.TopLogProbs}");
        Check(request.PromptTop is >= 0 and <= MaxTop && request.PromptTop <= vocabSize, nameof(request.PromptTop),
            $"must be between 0 and {Math.Min(MaxTop, vocabSize)}, is {request.PromptTop}");
        Check(request.PromptTop == 0 || request.PromptLogProbs, nameof(request.PromptTop),
            $"needs {Problem.OtherField}", nameof(request.PromptLogProbs));
        Check(request.MaxStaleness is null or >= 0, nameof(request.MaxStaleness), $"must not be negative, is {request.MaxStaleness}");
        Check(request.Id.Length is > 0 and <= 256, nameof(request.Id), "must have 1 to 256 characters");
        return problems;
    }
}
