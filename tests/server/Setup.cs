global using Xunit;
using Rollout.Server.Tests;

[assembly: AssemblyFixture(typeof(SharedServer))]

namespace Rollout.Server.Tests;

/// <summary>One qwen3 server with byte tokens for all tests that do not change its state.</summary>
public sealed class SharedServer : IAsyncLifetime
{
    public ServerProcess Server { get; private set; } = null!;

    public async ValueTask InitializeAsync() => Server = await ServerProcess.StartAsync("qwen3", "--tokenizer", "bytes");

    public ValueTask DisposeAsync() => Server.DisposeAsync();
}

/// <summary>Tests that measure time or memory run alone, after all others.</summary>
[CollectionDefinition(Name, DisableParallelization = true)]
public sealed class Alone
{
    public const string Name = "alone";
}
