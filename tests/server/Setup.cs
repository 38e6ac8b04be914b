global using Xunit;
using Rollout.Server.Tests;

[assembly: AssemblyFixture(typeof(SharedServer))]

namespace Rollout.Server.Tests;

/// <summary>One qwen3 server with byte tokens for all tests that leave it as they found it.</summary>
public sealed class SharedServer : IAsyncLifetime
{
    public ServerProcess Server { get; private set; } = null!;

    public async ValueTask InitializeAsync() => Server = await ServerProcess.StartAsync("qwen3", "--tokenizer", "bytes");

    public ValueTask DisposeAsync() => Server.DisposeAsync();
}

/// <summary>What measures time or memory runs alone, after everything else.</summary>
[CollectionDefinition(Name, DisableParallelization = true)]
public sealed class Alone
{
    public const string Name = "alone";
}
