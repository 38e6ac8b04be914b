namespace Rollout.Client;

/// <summary>Assembles the samples of one group from chunks, which are whole samples or parts of them.</summary>
internal sealed class GroupAssembly(string requestId, int n)
{
    private readonly Dictionary<int, List<SampleChunk>> _open = [];
    private readonly HashSet<int> _ended = [];
    private ulong _seed;
    private PromptInfo? _prompt;

    public string RequestId => requestId;

    public bool Complete => _ended.Count >= n;

    /// <summary>Samples that ended with this reply, in the reply's order.</summary>
    /// <exception cref="RolloutException">The chunks are inconsistent, which is an error of the sidecar.</exception>
    public IEnumerable<Sample> Add(V1.GenerateReply reply)
    {
        if (reply.HasSeed)
            _seed = reply.Seed;
        if (reply.Prompt is { } prompt)
            _prompt = new PromptInfo(prompt.Ids.ToInts(), prompt.Logprobs.ToFloats(), (int)prompt.CachedTokens);
        foreach (V1.SampleChunk message in reply.Samples)
        {
            SampleChunk chunk = SampleChunk.From(requestId, message);
            if (!_open.TryGetValue(chunk.Index, out List<SampleChunk>? parts))
                _open.Add(chunk.Index, parts = []);
            parts.Add(Checked(chunk, parts));
            if (chunk.FinishReason is not { } reason)
                continue;
            _open.Remove(chunk.Index);
            _ended.Add(chunk.Index);
            yield return Joined(parts, reason);
        }
    }

    private SampleChunk Checked(SampleChunk chunk, List<SampleChunk> before)
    {
        int expected = before.Sum(part => part.Ids.Length);
        if (chunk.Index >= n || _ended.Contains(chunk.Index))
            throw Broken(chunk, $"it came after the sample's end or is not one of the {n} asked for");
        if (chunk.Start != expected)
            throw Broken(chunk, $"it starts at token {chunk.Start}, expected {expected}");
        if (chunk.LogProbs.Length != chunk.Ids.Length || chunk.SamplingLogProbs.Length != chunk.Ids.Length)
            throw Broken(chunk, $"{chunk.Ids.Length} ids, {chunk.LogProbs.Length} and {chunk.SamplingLogProbs.Length} log-probabilities");
        return chunk;
    }

    private Sample Joined(List<SampleChunk> parts, FinishReason reason)
    {
        SampleChunk last = parts[^1];
        bool whole = parts.Count == 1;
        return new Sample
        {
            RequestId = requestId,
            Index = last.Index,
            Seed = _seed,
            Ids = whole ? last.Ids : [.. parts.SelectMany(part => part.Ids)],
            LogProbs = whole ? last.LogProbs : [.. parts.SelectMany(part => part.LogProbs)],
            SamplingLogProbs = whole ? last.SamplingLogProbs : [.. parts.SelectMany(part => part.SamplingLogProbs)],
            Versions = whole ? last.Versions : Joined(parts.SelectMany(part => part.Versions)),
            OldestKvVersion = parts.Min(part => part.OldestKvVersion),
            FinishReason = reason,
            Top = whole ? last.Top : JoinedTop(parts),
            Text = whole ? last.Text : string.Concat(parts.Select(part => part.Text)),
            Error = last.Error,
            Prompt = _prompt,
        };
    }

    private static List<VersionSpan> Joined(IEnumerable<VersionSpan> spans)
    {
        List<VersionSpan> joined = [];
        foreach (VersionSpan span in spans)
        {
            if (joined.Count > 0 && joined[^1] is var before && before.Version == span.Version && before.End == span.Start)
                joined[^1] = before with { End = span.End };
            else
                joined.Add(span);
        }

        return joined;
    }

    private static TopLogProbs? JoinedTop(List<SampleChunk> parts)
    {
        TopLogProbs[] tops = [.. parts.Select(part => part.Top).OfType<TopLogProbs>()];
        return tops.Length == 0
            ? null
            : new TopLogProbs(tops[0].K, [.. tops.SelectMany(top => top.Ids)], [.. tops.SelectMany(top => top.LogProbs)]);
    }

    private RolloutException Broken(SampleChunk chunk, string why) =>
        new($"the sidecar sent a chunk of sample {chunk.Index} of request '{requestId}' that does not fit: {why}");
}
