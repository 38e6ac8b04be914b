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

    /// <summary>All problems, each naming its field; empty when the request may run.</summary>
    public IReadOnlyList<Problem> Validate(GroupRequest request)
    {
        List<Problem> problems = [];
        void Check(bool good, string field, string message)
        {
            if (!good) problems.Add(new Problem(field, message));
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
        Check(prompt > 0, "prompt_ids", "must hold at least one token");
        Check(prompt <= maxContext, "prompt_ids", $"{prompt} tokens do not fit the context of {maxContext}");
        CheckIds(request.Prompt, "prompt_ids");

        Check(request.N is >= 1 and <= MaxN, "n", $"must be between 1 and {MaxN}, is {request.N}");
        Check(float.IsFinite(request.Temperature) && request.Temperature >= 0, "sampling.temperature",
            $"must be 0 or a positive number, is {request.Temperature}");
        Check(request.TopK >= 0, "sampling.top_k", $"must not be negative, is {request.TopK}");
        Check(request.TopP is > 0 and <= 1, "sampling.top_p", $"must be above 0 and at most 1, is {request.TopP}");
        Check(request.MinP is >= 0 and <= 1, "sampling.min_p", $"must be between 0 and 1, is {request.MinP}");
        Check(request.LogitBias.Count <= MaxBiases, "sampling.logit_bias", $"at most {MaxBiases} entries, has {request.LogitBias.Count}");
        CheckIds(request.LogitBias.Keys, "sampling.logit_bias");
        foreach ((int id, float bias) in request.LogitBias)
        {
            Check(float.IsFinite(bias) || float.IsNegativeInfinity(bias), $"sampling.logit_bias[{id}]",
                $"must be finite, or negative infinity to forbid, is {bias}");
        }

        if (request.MaxTokens is { } maxTokens)
        {
            Check(maxTokens >= 0, "stopping.max_tokens", $"must not be negative, is {maxTokens}");
            Check(maxTokens > 0 || request.PromptLogProbs, "stopping.max_tokens", "0 makes sense only with prompt_logprobs");
            Check(maxTokens > 0 || request.N == 1, "n", "must be 1 when max_tokens is 0");
            Check((long)prompt + maxTokens <= maxContext || prompt > maxContext, "stopping.max_tokens",
                $"{prompt} prompt tokens and {maxTokens} more do not fit the context of {maxContext}");
            Check(request.MinTokens <= maxTokens, "stopping.min_tokens", $"{request.MinTokens} is more than max_tokens {maxTokens}");
        }
        else
        {
            Check(prompt < maxContext, "prompt_ids", $"{prompt} tokens leave no room in the context of {maxContext}");
        }

        Check(request.MinTokens >= 0, "stopping.min_tokens", $"must not be negative, is {request.MinTokens}");
        Check(request.StopTokenIds.Count <= MaxStops, "stopping.stop_token_ids", $"at most {MaxStops}, has {request.StopTokenIds.Count}");
        CheckIds(request.StopTokenIds, "stopping.stop_token_ids");
        Check(request.StopStrings.Count <= MaxStops, "stopping.stop_strings", $"at most {MaxStops}, has {request.StopStrings.Count}");
        Check(request.StopStrings.All(stop => stop.Length is > 0 and <= 1024), "stopping.stop_strings", "each must have 1 to 1024 characters");
        Check(request.StopStrings.Count == 0 || hasTokenizer, "stopping.stop_strings", "the model has no tokenizer to find them with");
        Check(request.TopLogProbs is >= 0 and <= MaxTop && request.TopLogProbs <= vocabSize, "top_logprobs",
            $"must be between 0 and {Math.Min(MaxTop, vocabSize)}, is {request.TopLogProbs}");
        Check(request.PromptTop is >= 0 and <= MaxTop && request.PromptTop <= vocabSize, "top",
            $"must be between 0 and {Math.Min(MaxTop, vocabSize)}, is {request.PromptTop}");
        Check(request.PromptTop == 0 || request.PromptLogProbs, "top", "needs prompt_logprobs");
        Check(request.MaxStaleness is null or >= 0, "max_staleness", $"must not be negative, is {request.MaxStaleness}");
        Check(request.Id.Length is > 0 and <= 256, "request_id", "must have 1 to 256 characters");
        return problems;
    }
}
