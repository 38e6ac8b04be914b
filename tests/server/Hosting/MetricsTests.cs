using System.Globalization;
using System.Text.RegularExpressions;
using Grpc.Core;
using Rollout.V1;

namespace Rollout.Server.Tests;

/// <summary>What an operator's Prometheus reads.</summary>
public sealed class MetricsTests
{
    [Fact]
    public async Task Updates_versions_and_staleness_can_be_scraped()
    {
        Payload payload = Payload.Reversed("qwen3");
        await using ServerProcess server = await ServerProcess.StartAsync("qwen3", "--metrics", "127.0.0.1:0");
        string address = server.Ready.GetProperty("metrics").GetString()!;
        Assert.Equal(server.Address, server.Ready.GetProperty("addresses").EnumerateArray().Single().GetString());

        await UpdateAsync(server, payload.Begin(0, 3), [.. payload.Chunks(1 << 20), payload.Commit()]);
        await UpdateAsync(server, payload.Begin(0, 4), []);                                // rejected: 3 is served
        await UpdateAsync(server, payload.Begin(3, 4), [payload.Chunks(1000).First()]);    // given up
        await server.SamplesAsync(Calls.Greedy([5, 6, 7], 16));

        using HttpClient http = new();
        string page = await http.GetStringAsync(new Uri(address), TestContext.Current.CancellationToken);
        Assert.Equal(3, Value(page, "rollout_updates_started_total"));
        Assert.Equal(1, Value(page, "rollout_updates_committed_total"));
        Assert.Equal(1, Value(page, "rollout_updates_failed_total", "reason=\"rejected\""));
        Assert.Equal(1, Value(page, "rollout_updates_failed_total", "reason=\"sender\""));
        Assert.Equal(payload.Bytes.Length, Value(page, "rollout_updates_bytes_total"));
        Assert.Equal(3, Value(page, "rollout_weights_version"));
        Assert.Equal(16, Value(page, "rollout_tokens_sampled_total", "staleness=\"0\""));
        foreach (string phase in (string[])["preflight", "transfer", "apply", "swap", "stall"])
            Assert.Equal(1, Value(page, "rollout_updates_seconds_count", $"phase=\"{phase}\""));
    }

    private static async Task UpdateAsync(ServerProcess server, UpdateRequest begin, UpdateRequest[] rest)
    {
        using AsyncDuplexStreamingCall<UpdateRequest, UpdateReply> update = server.Weights.Update(deadline: Calls.Deadline());
        await update.RequestStream.WriteAsync(begin);
        foreach (UpdateRequest request in rest) await update.RequestStream.WriteAsync(request);
        await update.RequestStream.CompleteAsync();
        await foreach (UpdateReply _ in update.ResponseStream.ReadAllAsync())
        {
        }
    }

    private static double Value(string page, string name, string label = "")
    {
        Match line = Regex.Match(page, $@"^{name}\{{[^}}]*{Regex.Escape(label)}[^}}]*\}} (\S+)", RegexOptions.Multiline);
        Assert.True(line.Success, $"no {name} {label} in:\n{page}");
        return double.Parse(line.Groups[1].Value, CultureInfo.InvariantCulture);
    }
}
