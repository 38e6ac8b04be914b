using System.Net;
using Rollout.Engine;
using Rollout.Kernels;

namespace Rollout.Server.Hosting;

/// <summary>What `rollout serve` was asked for, checked.</summary>
internal sealed record ServeOptions
{
    /// <summary>Listened on when the operator names nothing.</summary>
    public static readonly IPEndPoint DefaultEndPoint = new(IPAddress.Loopback, 50051);

    public required ModelSource Model { get; init; }

    public required EngineOptions Engine { get; init; }

    /// <summary>Absolute path of the Unix socket, or null.</summary>
    public string? Socket { get; init; }

    /// <summary>TCP endpoint, or null.</summary>
    public IPEndPoint? Listen { get; init; }

    /// <summary>Where Prometheus may ask, or null.</summary>
    public IPEndPoint? Metrics { get; init; }
}

/// <summary>Which model to load, and how to compute it.</summary>
/// <param name="Folder">A Hugging Face folder.</param>
/// <param name="Device">cpu, cuda, cuda:N, or auto: a GPU where one is usable.</param>
/// <param name="Threads">Worker threads; 0: one a core.</param>
/// <param name="Format">How matrices are stored.</param>
/// <param name="Tokenizer">"bytes" for one token a byte; null for the folder's own.</param>
internal sealed record ModelSource(string Folder, string Device, int Threads, WeightFormat Format, string? Tokenizer);
