using System.Diagnostics;
using System.Net;
using System.Net.Sockets;
using Grpc.Core;
using Grpc.Health.V1;
using Grpc.Net.Client;
using Rollout.Server.Commands;
using Rollout.V1;

namespace Rollout.Server.Tests;

public sealed class ShutdownTests
{
    /// <summary>Samples of a group: with four seats, more than can end before the signal, however late that comes.</summary>
    private const int Samples = 400;

    [Theory]
    [InlineData("TERM")]
    [InlineData("INT")]
    public async Task A_signal_ends_groups_with_what_they_have_and_leaves_no_socket(string signal)
    {
        if (signal == "INT" && IgnoresInterrupt()) Assert.Skip("a shell's background jobs ignore SIGINT, and so would the server");
        await using ServerProcess server = await ServerProcess.StartAsync("qwen3", "--max-sequences", "4");
        GenerateRequest request = Calls.Sampled([5, 6, 7], 500, seed: 1, n: Samples, change: r => r.Stream = true);
        using AsyncServerStreamingCall<GenerateReply> call = server.Rollout.Generate(request, deadline: Calls.Deadline());
        using AsyncDuplexStreamingCall<GenerateRequest, GenerateReply> batch = server.Rollout.GenerateBatch(deadline: Calls.Deadline());
        using AsyncDuplexStreamingCall<UpdateRequest, UpdateReply> idle = server.Weights.Update(deadline: Calls.Deadline());
        using AsyncServerStreamingCall<HealthCheckResponse> watch = server.Health.Watch(
            new HealthCheckRequest(), deadline: Calls.Deadline());
        Assert.True(await call.ResponseStream.MoveNext(default));
        Assert.True(await watch.ResponseStream.MoveNext(default));
        Assert.Equal(HealthCheckResponse.Types.ServingStatus.Serving, watch.ResponseStream.Current.Status);
        await batch.RequestStream.WriteAsync(request);
        for (int i = 0; i < 500 && (await server.Control.StatusAsync(new StatusRequest())).Waiting < Samples; i++) await Task.Delay(5);

        server.Signal(signal);
        List<SampleChunk> samples = Calls.Join([call.ResponseStream.Current, .. await call.ResponseStream.ReadAllAsync().ToListAsync()]);
        Assert.Equal(Samples, samples.Count);
        Assert.Equal(FinishReason.Abort, samples[^1].FinishReason);
        Assert.Contains(samples, sample => sample.Ids.Count > 0);

        Assert.True(await watch.ResponseStream.MoveNext(default));
        Assert.Equal(HealthCheckResponse.Types.ServingStatus.NotServing, watch.ResponseStream.Current.Status);
        Assert.False(await watch.ResponseStream.MoveNext(default));

        // The batch's client never closed its side, and the updater never began: neither may delay the stop.
        List<SampleChunk> batched = Calls.Join(await batch.ResponseStream.ReadAllAsync().ToListAsync());
        Assert.Equal(Samples, batched.Count(sample => sample.FinishReason != FinishReason.Unspecified));
        long leaving = Environment.TickCount64;
        Assert.Equal(0, await server.ExitAsync());
        Assert.True(Environment.TickCount64 - leaving < 9000, "the end waited for clients until the server's patience was over");
        Assert.False(File.Exists(server.SocketPath));
        Assert.Contains("[4] Stopped", server.Log, StringComparison.Ordinal);
    }

    [Fact]
    public async Task While_the_model_is_loaded_the_server_says_so_and_can_be_stopped()
    {
        using TemporaryFolder model = new();
        foreach (string file in (string[])["config.json", "model.safetensors"])
            File.Copy(Path.Combine(Golden.Folder("qwen3"), file), model[file]);
        using LeasedFile held = new(model["model.safetensors"]);
        await using ServerProcess server = ServerProcess.Launch(model.Path);
        while (!server.Log.Contains("Listening", StringComparison.Ordinal)) await Task.Delay(20, new CancellationTokenSource(30_000).Token);

        HealthCheckResponse health = await server.Health.CheckAsync(new HealthCheckRequest(), deadline: Calls.Deadline());
        Assert.Equal(HealthCheckResponse.Types.ServingStatus.NotServing, health.Status);
        Assert.Equal(EngineState.Loading, (await server.Control.StatusAsync(new StatusRequest(), deadline: Calls.Deadline())).State);
        RpcException refused = await Calls.FailsAsync(() => server.RepliesAsync(Calls.Greedy([5], 1)), StatusCode.Unavailable);
        Assert.Contains("loaded", refused.Status.Detail, StringComparison.Ordinal);
        server.Signal("TERM");
        Assert.Equal(0, await server.ExitAsync());
        Assert.False(File.Exists(server.SocketPath));
    }

    [Fact]
    public async Task A_socket_left_behind_is_taken_over_and_a_live_one_is_not()
    {
        await using ServerProcess first = await ServerProcess.StartAsync();
        Cli.Result second = await Cli.RunAsync("serve", "--model", Golden.Folder("qwen3"), "--socket", first.SocketPath);
        Assert.Equal(2, second.ExitCode);
        Assert.Contains("another server is listening", second.Errors, StringComparison.Ordinal);
        Assert.Single(await first.SamplesAsync(Calls.Greedy([5], 1)));

        first.Signal("KILL");
        await first.ExitAsync();
        Assert.True(File.Exists(first.SocketPath));
        using Process heir = Cli.Create(["serve", "--model", Golden.Folder("qwen3"), "--socket", first.SocketPath]);
        heir.Start();
        try
        {
            Assert.StartsWith("ready {", await heir.StandardOutput.ReadLineAsync(), StringComparison.Ordinal);
        }
        finally
        {
            heir.Kill();
            await heir.WaitForExitAsync();
        }
    }

    [Fact]
    public async Task Tcp_and_a_socket_at_once_and_a_port_in_use_is_an_error()
    {
        await using ServerProcess server = await ServerProcess.StartAsync("qwen3", "--listen", "127.0.0.1:0");
        string[] addresses = [.. server.Ready.GetProperty("addresses").EnumerateArray().Select(a => a.GetString()!)];
        Assert.Equal(2, addresses.Length);
        Assert.Equal(0, server.Ready.GetProperty("version").GetInt32());
        Uri tcp = new(Assert.Single(addresses, address => address.StartsWith("http:", StringComparison.Ordinal)));
        using GrpcChannel channel = RemoteRollouts.Open(tcp.ToString());
        ControlService.ControlServiceClient control = new(channel);
        StatusReply status = await control.StatusAsync(new StatusRequest(), deadline: Calls.Deadline());
        Assert.Equal("qwen3", status.Model);

        using TemporaryFolder folder = new();
        Cli.Result second = await Cli.RunAsync(
            "serve", "--model", Golden.Folder("qwen3"), "--socket", folder["s"], "--listen", $"127.0.0.1:{tcp.Port}");
        Assert.Equal(1, second.ExitCode);
        Assert.False(File.Exists(folder["s"]));
        Assert.Contains("in use", second.Errors, StringComparison.Ordinal);
    }

    /// <summary>One line and exit code 1, whatever the reason is and whichever address it concerns.</summary>
    [Fact]
    public async Task An_address_that_cannot_be_listened_on_is_one_line()
    {
        using Socket taken = new(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp);
        taken.Bind(new IPEndPoint(IPAddress.Loopback, 0));
        taken.Listen();
        string inUse = $"{taken.LocalEndPoint}";
        foreach ((string option, string address) in ((string, string)[])
            [("--listen", "10.9.8.7:5000"), ("--listen", "[fe80::1]:5000"), ("--listen", inUse), ("--metrics", inUse)])
        {
            Cli.Result result = await Cli.RunAsync("serve", "--model", Golden.Folder("qwen3"), option, address);
            Assert.Equal((1, ""), (result.ExitCode, result.Output));
            Assert.StartsWith("rollout: cannot listen on ", Assert.Single(result.Errors.TrimEnd().Split('\n')), StringComparison.Ordinal);
            Assert.Contains(address, result.Errors, StringComparison.Ordinal);
        }
    }

    [Fact]
    public void A_file_at_the_path_of_a_socket_is_not_overwritten()
    {
        using TemporaryFolder folder = new();
        string file = folder["file"];
        File.WriteAllText(file, "precious");
        Assert.Contains("not a socket", Hosting.SocketFile.FindProblem(file), StringComparison.Ordinal);
        Assert.False(Hosting.SocketFile.RemoveStale(file));
        Assert.Contains("directory", Hosting.SocketFile.FindProblem(folder.Path), StringComparison.Ordinal);
        Assert.Contains("does not exist", Hosting.SocketFile.FindProblem(folder["no/s"]), StringComparison.Ordinal);
        Assert.Contains("107", Hosting.SocketFile.FindProblem(folder[new string('x', 107)]), StringComparison.Ordinal);

        string stale = folder["stale"];
        using (Socket socket = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified))
        {
            socket.Bind(new UnixDomainSocketEndPoint(stale));
            socket.Listen();
            Assert.Contains("another server", Hosting.SocketFile.FindProblem(stale), StringComparison.Ordinal);
            Assert.False(Hosting.SocketFile.RemoveStale(stale));
        }

        Assert.Null(Hosting.SocketFile.FindProblem(stale));
        Assert.Null(Hosting.SocketFile.FindProblem(folder["new"]));
    }

    private static bool IgnoresInterrupt()
    {
        const int Interrupt = 2;
        string ignored = File.ReadLines("/proc/self/status").Single(line => line.StartsWith("SigIgn:", StringComparison.Ordinal));
        return (Convert.ToUInt64(ignored["SigIgn:".Length..].Trim(), 16) >> (Interrupt - 1) & 1) != 0;
    }
}
