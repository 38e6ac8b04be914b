using Xunit;

namespace Rollout.Client.Tests;

/// <summary>Tests of a client connected to a fake sidecar; each test has its own.</summary>
public abstract class FakeSidecarTests : IAsyncLifetime
{
    private protected FakeSidecar Fake { get; private set; } = null!;

    private protected RolloutClient Client { get; private set; } = null!;

    private protected static CancellationToken Token => TestContext.Current.CancellationToken;

    public virtual async ValueTask InitializeAsync()
    {
        Fake = await FakeSidecar.StartAsync();
        Client = RolloutClient.Connect(Fake.Address);
    }

    public virtual async ValueTask DisposeAsync()
    {
        await Client.DisposeAsync();
        await Fake.DisposeAsync();
        GC.SuppressFinalize(this);
    }
}
