using TorchSharp;
using static TorchSharp.torch;

namespace Rollout.Examples.Grpo;

/// <summary>Throw-away: samples in this process with TorchSharp, recomputing all, until the sidecar exists.</summary>
public sealed class LocalRollouts(PolicyConfig config) : IRollouts
{
    private readonly Policy _policy = new(config);
    private long _version;

    public static async Task<LocalRollouts> StartAsync(string folder, Policy policy)
    {
        _ = folder;
        var rollouts = new LocalRollouts(policy.Config);
        await rollouts.PushAsync(policy, 1);
        return rollouts;
    }

    public Task<IReadOnlyList<RolloutGroup>> SampleAsync(
        IReadOnlyList<int[]> prompts, int n, int maxTokens, double temperature, ulong seed, CancellationToken cancellation = default)
    {
        using var scope = NewDisposeScope();
        using var _ = no_grad();
        using var generator = new Generator(seed, null);
        var width = prompts[0].Length;
        if (prompts.Any(p => p.Length != width))
            throw new NotSupportedException("one length only");
        var rows = tensor(prompts.SelectMany(p => p.Select(t => (long)t)).ToArray()).view(prompts.Count, width)
            .repeat_interleave(n, dim: 0);
        var count = prompts.Count * n;
        var logProbs = new List<float[]>();
        for (var i = 0; i < maxTokens; i++)
        {
            using var inner = NewDisposeScope();
            var all = rows.data<long>().ToArray();
            var seen = new Dictionary<string, long>();
            var first = new List<long>();
            var inverse = new long[count];
            for (var r = 0; r < count; r++)
            {
                var key = string.Join(',', all.AsSpan(r * (width + i), width + i).ToArray());
                if (!seen.TryGetValue(key, out var at))
                {
                    seen[key] = at = first.Count;
                    first.Add(r);
                }

                inverse[r] = at;
            }

            var logits = _policy.forward(rows.index_select(0, tensor(first.ToArray()))).select(1, -1).log_softmax(-1)
                .index_select(0, tensor(inverse));
            var next = temperature == 0
                ? logits.argmax(-1, keepdim: true)
                : (logits / temperature).exp().multinomial(1, true, generator);
            logProbs.Add([.. logits.gather(1, next).data<float>()]);
            rows = cat([rows, next], 1).MoveToOuterDisposeScope();
        }

        var tokens = rows.slice(1, width, width + maxTokens, 1).contiguous().data<long>().ToArray();
        var groups = new List<RolloutGroup>();
        for (var p = 0; p < prompts.Count; p++)
        {
            var samples = new List<RolloutSample>();
            for (var s = 0; s < n; s++)
            {
                var row = (p * n) + s;
                var all = tokens.AsSpan(row * maxTokens, maxTokens);
                var end = all.IndexOf(ArithmeticTask.EndOfText);
                var length = end < 0 ? maxTokens : end + 1;
                samples.Add(new(
                    [.. all[..length].ToArray().Select(t => (int)t)],
                    [.. Enumerable.Range(0, length).Select(i => logProbs[i][row])],
                    _version));
            }

            groups.Add(new(prompts[p], samples));
        }

        return Task.FromResult<IReadOnlyList<RolloutGroup>>(groups);
    }

    public Task PushAsync(Policy policy, long version, CancellationToken cancellation = default)
    {
        using var scope = NewDisposeScope();
        using var _ = no_grad();
        foreach (var (mine, theirs) in _policy.parameters().Zip(policy.parameters()))
            mine.copy_(theirs.to(bfloat16));
        _version = version;
        return Task.CompletedTask;
    }

    public ValueTask DisposeAsync()
    {
        _policy.Dispose();
        return default;
    }
}
