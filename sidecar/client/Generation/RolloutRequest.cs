using Google.Protobuf.Collections;
using Rollout.V1;

namespace Rollout.Client;

/// <summary>One group: a prompt and how to draw samples from it.</summary>
public sealed record RolloutRequest
{
    public RolloutRequest(Prompt prompt, GenerateOptions? options = null)
    {
        ArgumentNullException.ThrowIfNull(prompt);
        Prompt = prompt;
        Options = options ?? GenerateOptions.Default;
    }

    /// <summary>Must be unique among the groups in flight at the sidecar. Random by default.</summary>
    public string RequestId { get; init; } = Guid.NewGuid().ToString("n");

    public Prompt Prompt { get; init; }

    public GenerateOptions Options { get; init; }

    /// <exception cref="ArgumentException">Numbers that the protocol sends unsigned are negative; lists all of them.</exception>
    internal V1.GenerateRequest ToProto(bool stream)
    {
        ThrowIfNegative();
        GenerateRequest request = new()
        {
            RequestId = RequestId,
            N = (uint)Options.N,
            Sampling = Sampling(),
            Stopping = Stopping(),
            TopLogprobs = (uint)Options.TopLogProbs,
            PromptLogprobs = Options.PromptLogProbs,
            Stream = stream,
            ReturnText = Options.ReturnText,
            CacheSalt = Options.CacheSalt,
        };
        if (Options.Seed is { } seed)
            request.Seed = seed;
        if (Options.MaxStaleness is { } staleness)
            request.MaxStaleness = (uint)staleness;
        if (Prompt.Ids is { } ids)
            request.PromptIds = ids.ToTokenIds();
        else
            request.PromptText = Prompt.Text;
        return request;
    }

    private V1.SamplingParams Sampling()
    {
        SamplingParams sampling = new()
        {
            Temperature = Options.Temperature,
            TopK = (uint)Options.TopK,
            TopP = Options.TopP,
            MinP = Options.MinP,
        };
        if (Options.LogitBias is { } bias)
        {
            MapField<uint, float> field = sampling.LogitBias;
            foreach ((int id, float value) in bias)
                field[(uint)id] = value;
        }

        return sampling;
    }

    private V1.StoppingParams Stopping()
    {
        StoppingParams stopping = new() { MinTokens = (uint)Options.MinTokens, IgnoreEos = Options.IgnoreEos };
        if (Options.MaxTokens is { } max)
            stopping.MaxTokens = (uint)max;
        stopping.StopTokenIds.AddRange(Options.StopTokenIds.Select(id => (uint)id));
        stopping.StopStrings.AddRange(Options.StopStrings);
        return stopping;
    }

    // The sidecar checks all other limits and lists every problem in one answer.
    private void ThrowIfNegative()
    {
        List<string>? problems = null;
        Check(nameof(Options.N), Options.N);
        Check(nameof(Options.MaxTokens), Options.MaxTokens ?? 0);
        Check(nameof(Options.MinTokens), Options.MinTokens);
        Check(nameof(Options.TopK), Options.TopK);
        Check(nameof(Options.TopLogProbs), Options.TopLogProbs);
        Check(nameof(Options.MaxStaleness), Options.MaxStaleness ?? 0);
        foreach (int id in Options.StopTokenIds)
            Check(nameof(Options.StopTokenIds), id);
        foreach (int id in Options.LogitBias?.Keys ?? [])
            Check(nameof(Options.LogitBias), id);
        if (problems is not null)
            throw new ArgumentException($"request '{RequestId}': {string.Join("; ", problems)}");

        void Check(string name, int value)
        {
            if (value < 0)
                (problems ??= []).Add($"{name}: {value} is negative");
        }
    }
}
