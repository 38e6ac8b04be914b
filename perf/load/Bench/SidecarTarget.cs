using System.Reflection;
using Rollout.Client;

namespace Rollout.Load.Bench;

/// <summary>A sidecar in its own process, used by the .NET client over its Unix socket.</summary>
internal sealed class SidecarTarget : ITarget
{
    private readonly SidecarProcess _server;
    private readonly RolloutClient _client;
    private readonly string _folder;
    private int _run;

    private SidecarTarget(SidecarProcess server, RolloutClient client, string folder)
    {
        _server = server;
        _client = client;
        _folder = folder;
    }

    public string Name => "rollout";

    public RolloutClient Client => _client;

    public static async Task<SidecarTarget> StartAsync(
        string model, string dtype, int threads, int sequences, CancellationToken cancellation)
    {
        string folder = Directory.CreateTempSubdirectory("rollout-load-").FullName;
        string socket = Path.Combine(folder, "s");
        SidecarProcess server = await SidecarProcess.StartAsync(new SidecarOptions
        {
            Program = typeof(SidecarTarget).Assembly.GetCustomAttributes<AssemblyMetadataAttribute>()
                .Single(attribute => attribute.Key == "RolloutProgram").Value!,
            ModelFolder = model,
            SocketPath = socket,
            ExtraArguments =
            [
                "--max-context", "1024", "--max-sequences", $"{sequences}", "--max-batch-tokens", "512",
                "--threads", $"{threads}", "--dtype", dtype,
            ],
            StopTimeout = TimeSpan.FromSeconds(5),
        }, cancellation);
        return new SidecarTarget(server, RolloutClient.Connect($"unix:{socket}"), folder);
    }

    /// <summary>Ensures that later samples find nothing of earlier ones in the prefix cache.</summary>
    public void Forget() => _run++;

    public async Task DrawAsync(int id, Arrival arrival, Action<int> onTokens, CancellationToken cancellation)
    {
        GenerateOptions options = new() { MaxTokens = arrival.MaxTokens, IgnoreEos = true, Seed = (ulong)id, CacheSalt = $"{_run}" };
        await foreach (SampleChunk chunk in _client.StreamAsync(arrival.Prompt, options, cancellationToken: cancellation))
        {
            if (chunk.Ids.Length > 0) onTokens(chunk.Ids.Length);
        }
    }

    public async ValueTask DisposeAsync()
    {
        await _client.DisposeAsync();
        await _server.DisposeAsync();
        Directory.Delete(_folder, recursive: true);
    }
}
