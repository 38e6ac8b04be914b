using System.CommandLine;
using Rollout.Engine;
using Rollout.Server.Hosting;

namespace Rollout.Server.Commands;

/// <summary>--model DIR loads a model here; --address asks a server that has one. Exactly one of the two.</summary>
internal sealed class SourceArguments
{
    // One command needs only a small cache; the server's default would zero gigabytes first.
    private const long KvCacheBytes = 1L << 30;

    public EngineArguments Engine { get; } = new();

    public Option<string?> Address { get; } = new("--address")
    {
        Description = "Ask the server at unix:PATH or http://HOST:PORT instead of loading a model.",
        HelpName = "ADDRESS",
    };

    public void AddTo(Command command)
    {
        Engine.AddTo(command);
        command.Add(Address);
        Address.Validators.Add(result =>
        {
            if (Arguments.Value(result) is { } address && RemoteRollouts.FindProblem(address) is { } problem)
                result.AddError($"--address: {problem}");
        });
        command.Validators.Add(result =>
        {
            bool model = result.GetResult(Engine.Model) is not null;
            bool address = result.GetResult(Address) is not null;
            if (!model && !address) result.AddError("--model or --address must be given: a folder to load, or a server to ask");
            if (model && address) result.AddError("--model and --address exclude each other");
            if (!address) return;
            foreach (Option option in (Option[])[Engine.Threads, Engine.Device, Engine.DType, Engine.Tokenizer, Engine.MaxContext])
            {
                if (result.GetResult(option) is not null) result.AddError($"{option.Name}: the server at --address has its own");
            }
        });
    }

    /// <summary>Loads the model, or opens the channel.</summary>
    public async Task<IRollouts> OpenAsync(ParseResult result)
    {
        if (result.GetValue(Address) is { } address) return new RemoteRollouts(address);
        EngineOptions options = new() { MaxContext = result.GetValue(Engine.MaxContext) ?? 0, KvCacheBytes = KvCacheBytes };
        return new LocalRollouts(await ModelLoader.LoadAsync(Engine.Source(result), options));
    }
}
