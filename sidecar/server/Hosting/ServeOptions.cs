using System.Net;
using Rollout.Engine;
using Rollout.Kernels;

namespace Rollout.Server.Hosting;

/// <summary>The checked options of `rollout serve`.</summary>
internal sealed record ServeOptions
{
    /// <summary>The default address to listen on.</summary>
    public static readonly IPEndPoint DefaultEndPoint = new(IPAddress.Loopback, 50051);

    public required ModelSource Model { get; init; }

    public required EngineOptions Engine { get; init; }

    /// <summary>Absolute path of the Unix socket, or null.</summary>
    public string? Socket { get; init; }

    /// <summary>TCP endpoint, or null.</summary>
    public IPEndPoint? Listen { get; init; }

    /// <summary>Endpoint of /metrics for Prometheus, or null.</summary>
    public IPEndPoint? Metrics { get; init; }
}

/// <summary>The model to load, and the device and format to run it with.</summary>
/// <param name="Folder">A Hugging Face folder.</param>
/// <param name="Device">cpu, cuda, cuda:N, or auto: a GPU where one is usable.</param>
/// <param name="Threads">Worker threads; 0: one a core.</param>
/// <param name="Format">How matrices are stored.</param>
/// <param name="Tokenizer">"bytes" for one token per byte; null for the folder's own.</param>
internal sealed record ModelSource(string Folder, string Device, int Threads, WeightFormat Format, string? Tokenizer);
