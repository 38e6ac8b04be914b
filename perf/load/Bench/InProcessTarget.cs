using Rollout.Engine;
using Rollout.Kernels;

namespace Rollout.Load.Bench;

/// <summary>The engine in this process, without any transport.</summary>
internal sealed class InProcessTarget : ITarget
{
    private readonly RolloutEngine _engine;
    private int _run;

    public InProcessTarget(string model, WeightFormat format, int threads, int sequences)
        => _engine = RolloutEngine.Load(model, new CpuBackend(threads, format: format),
            new EngineOptions { MaxContext = 1024, MaxSequences = sequences, MaxBatchTokens = 512 });

    public string Name => "in process";

    /// <summary>Ensures that later samples find nothing of earlier ones in the prefix cache.</summary>
    public void Forget() => _run++;

    public async Task DrawAsync(int id, Arrival arrival, Action<int> onTokens, CancellationToken cancellation)
    {
        Group group = _engine.Submit(new GroupRequest
        {
            Id = $"{_run}.{id}",
            Prompt = arrival.Prompt,
            MaxTokens = arrival.MaxTokens,
            IgnoreEos = true,
            Seed = (ulong)id,
            CacheSalt = $"{_run}",
            StreamTokens = true,
        });
        await foreach (SequenceChunk chunk in group.ReadAsync(cancellation))
        {
            if (chunk.End > chunk.Start) onTokens(chunk.End - chunk.Start);
        }
    }

    public ValueTask DisposeAsync() => _engine.DisposeAsync();
}
