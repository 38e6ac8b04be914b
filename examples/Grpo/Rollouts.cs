using System.Reflection;
using Rollout.Client;
using Rollout.Client.Torch;

namespace Rollout.Examples.Grpo;

/// <summary>One sampled completion, the engine's log-probability of each token, and the weights version that drew it.</summary>
public sealed record RolloutSample(int[] Tokens, float[] LogProbs, ulong Version);

/// <summary>All samples of one prompt.</summary>
public sealed record RolloutGroup(int[] Prompt, IReadOnlyList<RolloutSample> Samples);

/// <summary>The sidecar, started as a child process: the source of samples and the target of weight pushes.</summary>
public sealed class Rollouts : IAsyncDisposable
{
    private readonly SidecarProcess _sidecar;
    private readonly RolloutClient _client;
    private readonly WeightPublisher _publisher;

    private Rollouts(SidecarProcess sidecar)
    {
        _sidecar = sidecar;
        _client = sidecar.Connect();
        _publisher = new WeightPublisher(_client);
    }

    /// <summary>Runs `rollout serve` on a Unix socket and waits until it has loaded the model.</summary>
    public static async Task<Rollouts> StartAsync(string modelFolder, int threads, string device)
    {
        // The build puts the program's path into this assembly; a trainer outside the repository uses an installed `rollout`.
        string program = typeof(Rollouts).Assembly.GetCustomAttributes<AssemblyMetadataAttribute>()
            .Single(attribute => attribute.Key == "RolloutProgram").Value!;
        return new Rollouts(await SidecarProcess.StartAsync(new SidecarOptions
        {
            Program = program,
            ModelFolder = modelFolder,
            Threads = threads,
            Device = device,
        }));
    }

    /// <summary>Samples n completions of every prompt, all groups on one call; temperature 0 picks the most probable token.</summary>
    public async Task<IReadOnlyList<RolloutGroup>> SampleAsync(
        IReadOnlyList<int[]> prompts, int n, int maxTokens, float temperature, ulong seed)
    {
        GenerateOptions options = new() { N = n, MaxTokens = maxTokens, Temperature = temperature };
        RolloutRequest[] requests = [.. prompts.Select((prompt, i) => new RolloutRequest(prompt, options with { Seed = seed + (ulong)i }))];
        Dictionary<RolloutRequest, IReadOnlyList<Sample>> samples = [];
        await foreach (SampleGroup group in _client.GenerateGroupsAsync(requests))
            samples.Add(group.Request, group.Samples);
        return [.. prompts.Zip(requests, (prompt, request) => new RolloutGroup(prompt, [.. samples[request].Select(Finished)]))];
    }

    private static RolloutSample Finished(Sample sample) => sample.FinishReason is FinishReason.Error or FinishReason.Abort
        ? throw new InvalidOperationException($"a sample ended with {sample.FinishReason}: {sample.Error}")
        : new RolloutSample(sample.Ids, sample.LogProbs, sample.Versions[^1].Version);

    /// <summary>Pushes the policy's weights to the running sidecar, as bf16, through shared memory, all or nothing.</summary>
    public async Task PushAsync(Policy policy, ulong version) => await _publisher.PushAsync(policy, version);

    public async ValueTask DisposeAsync()
    {
        await _publisher.DisposeAsync();
        await _client.DisposeAsync();
        await _sidecar.DisposeAsync();
    }
}
