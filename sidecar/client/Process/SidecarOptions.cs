namespace Rollout.Client;

/// <summary>How to start a sidecar.</summary>
public sealed record SidecarOptions
{
    /// <summary>Path of rollout.dll or of the rollout executable.</summary>
    public required string Program { get; init; }

    /// <summary>Folder of a Hugging Face checkpoint.</summary>
    public required string ModelFolder { get; init; }

    /// <summary>Unix socket to listen on. Null: a new one in the temporary folder.</summary>
    public string? SocketPath { get; init; }

    /// <summary>Worker threads of the CPU backend. Null: the sidecar's default.</summary>
    public int? Threads { get; init; }

    /// <summary>cpu, cuda, cuda:N or auto. Null: the sidecar's default.</summary>
    public string? Device { get; init; }

    /// <summary>Appended to the command line as they are.</summary>
    public IReadOnlyList<string> ExtraArguments { get; init; } = [];

    /// <summary>How long loading the model may take.</summary>
    public TimeSpan ReadyTimeout { get; init; } = TimeSpan.FromMinutes(5);

    /// <summary>How long the sidecar may take to stop before it is killed.</summary>
    public TimeSpan StopTimeout { get; init; } = TimeSpan.FromSeconds(10);

    /// <summary>Gets every line the sidecar prints, on a thread of the pool. Null: only errors include the last ones.</summary>
    public Action<string>? OnLine { get; init; }
}
