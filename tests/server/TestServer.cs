using Grpc.Health.V1;
using Grpc.Net.Client;
using Rollout.Server.Commands;
using Rollout.V1;

namespace Rollout.Server.Tests;

/// <summary>A server to call, in this or another process.</summary>
public abstract class TestServer
{
    private protected TestServer(string address)
    {
        Address = address;
        Channel = RemoteRollouts.Open(address);
        Rollout = new RolloutService.RolloutServiceClient(Channel);
        Weights = new WeightsService.WeightsServiceClient(Channel);
        Control = new ControlService.ControlServiceClient(Channel);
        Health = new Health.HealthClient(Channel);
    }

    public string Address { get; }

    public GrpcChannel Channel { get; }

    public RolloutService.RolloutServiceClient Rollout { get; }

    public WeightsService.WeightsServiceClient Weights { get; }

    public ControlService.ControlServiceClient Control { get; }

    public Health.HealthClient Health { get; }

    /// <summary>Polls the status until it meets a condition.</summary>
    public async Task<StatusReply> StatusAsync(Func<StatusReply, bool> wanted)
    {
        for (DateTime until = Calls.Deadline(); ;)
        {
            StatusReply status = await Control.StatusAsync(new StatusRequest(), deadline: Calls.Deadline());
            if (wanted(status)) return status;
            Assert.True(DateTime.UtcNow < until, $"the server did not come to the wanted state: {status}");
            await Task.Delay(5);
        }
    }
}
