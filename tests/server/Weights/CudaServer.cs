using System.Globalization;
using Rollout.V1;

namespace Rollout.Server.Tests;

/// <summary>A server on the first of two simulated devices, shared by the tests of one class.</summary>
public sealed class CudaServer : IAsyncLifetime
{
    private ServerProcess? _process;

    public ServerProcess Process => _process!;

    /// <summary>The environment of all its processes.</summary>
    public (string Name, string Value)[] Variables { get; private set; } = [];

    public ValueTask InitializeAsync() => ValueTask.CompletedTask;

    public ValueTask DisposeAsync() => _process?.DisposeAsync() ?? ValueTask.CompletedTask;

    /// <summary>Starts it, unless it runs. Skips the test where there is no simulated device.</summary>
    public async Task StartAsync()
    {
        if (_process is not null) return;
        Variables = [.. await SimulatedCuda.RequireAsync(), ("ROLLOUT_SIM_DEVICES", "2")];
        _process = await ServerProcess.StartAsync("qwen3", Variables, "--device", "cuda", "--max-sequences", "4", "--kv-cache", "4MiB");
    }

    /// <summary>Pieces of simulated devices' memory that the server has mapped: its own, and what it has opened.</summary>
    public int Mappings()
    {
        string id = Process.Id.ToString(CultureInfo.InvariantCulture);
        return File.ReadLines($"/proc/{id}/maps").Count(line => line.Contains("/memfd:cuda-sim ", StringComparison.Ordinal));
    }
}

/// <summary>A process of its own with a buffer in device memory, for which the test sends messages.</summary>
internal sealed class Holder : IAsyncDisposable
{
    private const ulong Offset = 512; // of the buffer in its allocation

    private readonly TemporaryFolder _folder;
    private readonly TrainerProcess _process;

    private Holder(TemporaryFolder folder, TrainerProcess process, CudaIpc handles)
        => (_folder, _process, Handles) = (folder, process, handles);

    public CudaIpc Handles { get; }

    public static Task<Holder> StartAsync(CudaServer server, Payload payload, int device = 0) => StartAsync(server, payload.Bytes, device);

    public static async Task<Holder> StartAsync(CudaServer server, byte[] bytes, int device = 0)
    {
        TemporaryFolder folder = new();
        await File.WriteAllBytesAsync(folder["bytes"], bytes);
        TrainerProcess process = TrainerProcess.Hold(folder["bytes"], device, server.Variables);
        return new Holder(folder, process, CudaIpc.Parser.ParseFrom(Convert.FromHexString(await process.AskAsync())));
    }

    /// <summary>All of a payload, which it has.</summary>
    public UpdateRequest All(Payload payload) => Ranges((0, 0, (ulong)payload.Bytes.Length));

    public UpdateRequest Ranges(params (ulong At, ulong PayloadOffset, ulong Bytes)[] ranges) => new()
    {
        CudaIpc = new CudaIpc(Handles)
        {
            Ranges =
            {
                ranges.Select(range => new CudaRange
                {
                    Offset = unchecked(Offset + range.At),
                    PayloadOffset = range.PayloadOffset,
                    Bytes = range.Bytes,
                }),
            },
        },
    };

    /// <summary>Queues writing these bytes, and the event after them.</summary>
    public Task WriteAsync(Payload payload) => WriteAsync(payload.Bytes);

    /// <inheritdoc cref="WriteAsync(Payload)"/>
    public async Task WriteAsync(ReadOnlyMemory<byte> bytes)
    {
        await File.WriteAllBytesAsync(_folder["bytes"], bytes);
        Assert.Equal("done", await _process.AskAsync($"write {_folder["bytes"]}"));
    }

    /// <summary>Queues writing, and stops the process before the device has done it.</summary>
    public async Task StopAsync(Payload payload)
    {
        await File.WriteAllBytesAsync(_folder["bytes"], payload.Bytes);
        await _process.TellAsync($"stop {_folder["bytes"]}");
        string status = $"/proc/{_process.Id.ToString(CultureInfo.InvariantCulture)}/status";
        while (!(await File.ReadAllTextAsync(status)).Contains("State:\tT", StringComparison.Ordinal)) await Task.Delay(5);
    }

    /// <summary>Waits until it is written.</summary>
    public async Task WaitAsync() => Assert.Equal("done", await _process.AskAsync("wait"));

    public async Task FreeAsync() => Assert.Equal("done", await _process.AskAsync("free"));

    public async ValueTask DisposeAsync()
    {
        await _process.DisposeAsync();
        _folder.Dispose();
    }
}
