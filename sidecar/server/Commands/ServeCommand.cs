using System.CommandLine;
using System.Net;
using Rollout.Engine;
using Rollout.Server.Hosting;

namespace Rollout.Server.Commands;

/// <summary>`rollout serve`.</summary>
internal static class ServeCommand
{
    public const string Name = "serve";

    public static Command Create()
    {
        EngineArguments engine = new();
        Option<string?> socket = new("--socket") { Description = "Unix socket to listen on.", HelpName = "PATH" };
        Option<string?> listen = new("--listen")
        {
            Description = $"TCP address to listen on; port 0 takes a free one. Default without --socket: {ServeOptions.DefaultEndPoint}.",
            HelpName = "HOST:PORT",
        };
        Option<string?> metrics = new("--metrics")
        {
            Description = "TCP address to serve /metrics on, for Prometheus.",
            HelpName = "HOST:PORT",
        };
        Option<int?> maxSequences = Arguments.Number("--max-sequences", "Most samples in one step. Default: 256.", 1, 65_536);
        Option<int?> maxBatchTokens = Arguments.Number(
            "--max-batch-tokens", "Most tokens in one step. Default: 512 on a CPU, 4096 on a GPU.", 1, 1 << 20);
        Option<MemoryShare?> kvCache = Arguments.Memory(
            "--kv-cache", "Memory for keys and values: 512MiB, 2GB, or 40% of what the device has free once weights are loaded. "
                + "Default: as needed, at most a quarter of the machine's, or half of what a GPU has free.");
        socket.Validators.Add(result =>
        {
            if (Arguments.Value(result) is { } path && SocketFile.FindProblem(path) is { } problem) result.AddError($"--socket: {problem}");
        });
        foreach (Option<string?> address in (Option<string?>[])[listen, metrics])
        {
            address.Validators.Add(result =>
            {
                if (Arguments.Value(result) is not { } text) return;
                ListenAddress.Parse(text, out string? problem);
                if (problem is not null) result.AddError($"{address.Name}: {problem}");
            });
        }


        Command command = new(Name, "Serve a model over gRPC until SIGTERM or Ctrl+C.");
        engine.AddTo(command);
        command.Add(socket);
        command.Add(listen);
        command.Add(metrics);
        command.Add(maxSequences);
        command.Add(maxBatchTokens);
        command.Add(kvCache);
        command.Validators.Add(result =>
        {
            if (result.GetResult(engine.Model) is null) result.AddError("--model: must be given: the folder of the model to serve");
        });
        command.SetAction(result =>
        {
            EngineOptions defaults = new();
            string? path = result.GetValue(socket);
            string? address = result.GetValue(listen);
            IPEndPoint? endPoint = address is not null ? ListenAddress.Parse(address, out _)
                : path is null ? ServeOptions.DefaultEndPoint
                : null;
            return ServerApp.RunAsync(new ServeOptions
            {
                Model = engine.Source(result),
                Engine = defaults with
                {
                    MaxContext = result.GetValue(engine.MaxContext) ?? 0,
                    MaxSequences = result.GetValue(maxSequences) ?? defaults.MaxSequences,
                    MaxBatchTokens = result.GetValue(maxBatchTokens) ?? defaults.MaxBatchTokens,
                    KvCacheBytes = result.GetValue(kvCache)?.Bytes ?? 0,
                    KvCacheFraction = result.GetValue(kvCache)?.Fraction ?? 0,
                },
                Socket = path is null ? null : Path.GetFullPath(path),
                Listen = endPoint,
                Metrics = result.GetValue(metrics) is { } scraped ? ListenAddress.Parse(scraped, out _) : null,
            });
        });
        return command;
    }
}
