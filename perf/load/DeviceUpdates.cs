using System.CommandLine;
using System.Diagnostics;
using System.Reflection;
using System.Text.Json;
using Rollout.Client;
using Rollout.Engine;
using Rollout.Native;
using Spectre.Console;

namespace Rollout.Load;

/// <summary>
/// Pushes of a trainer, this process, that has the weights in a GPU's memory, to a sidecar on a GPU: from the call to the first token of
/// the new policy, beside a plain copy of the same bytes on the device, and what a push after the first cost, counted.
/// </summary>
internal static class DeviceUpdates
{
    private const long Alignment = 256;

    private sealed record Result(
        string Backend, PushResult Last, double ToToken, double Push, double Stall, double Copy, long MemoryGrowth, bool Committed);

    public static async Task<int> RunAsync(
        string device, string transport, string? model, int repeats, bool json, CancellationToken cancellation)
    {
        string folder = model ?? ShapeS.Folder();
        Result result = await MeasureAsync(device, transport, folder, repeats, cancellation);
        PushCounts counts = result.Last.Counts;
        if (json)
        {
            Console.WriteLine(JsonSerializer.Serialize(new
            {
                backend = result.Backend,
                transport = $"{result.Last.Transport}",
                reason = result.Last.TransportReason,
                bytes = result.Last.PayloadBytes,
                to_first_token_s = result.ToToken,
                push_s = result.Push,
                stall_s = result.Stall,
                device_copy_s = result.Copy,
                rpcs = counts.Messages,
                handles_opened = counts.HandlesOpened,
                device_allocations = counts.DeviceAllocations,
                launches_per_bucket = counts.Buckets == 0 ? 0 : (double)counts.Launches / counts.Buckets,
                graphs_captured = counts.GraphsCaptured,
                passes_over_bytes = (double)counts.DeviceBytes / Math.Max(1, TensorBytes(folder)),
                host_bytes = counts.HostBytes,
                device_memory_growth_bytes = result.MemoryGrowth,
                committed = result.Committed,
            }));
            return 0;
        }

        string title = $"{result.Last.PayloadBytes / 1e6:F1} MB to {result.Backend} by {result.Last.Transport}";
        Table table = new() { Title = new TableTitle(title) };
        table.AddColumns("what", "value");
        table.AddRow("to the first token of the new policy, ms", $"{result.ToToken * 1e3:F2}");
        table.AddRow("push, ms", $"{result.Push * 1e3:F2}");
        table.AddRow("stall, ms", $"{result.Stall * 1e3:F2}");
        table.AddRow("plain copy on the device, ms", $"{result.Copy * 1e3:F2}");
        table.AddRow("growth of the device's memory in use after the first push, bytes", $"{result.MemoryGrowth}");
        table.AddRow("counts of a push after the first", Markup.Escape($"{counts}"));
        AnsiConsole.Write(table);
        return 0;
    }

    private static async Task<Result> MeasureAsync(
        string device, string transport, string folder, int repeats, CancellationToken cancellation)
    {
        await using SidecarProcess server = await SidecarProcess.StartAsync(new SidecarOptions
        {
            Program = typeof(DeviceUpdates).Assembly.GetCustomAttributes<AssemblyMetadataAttribute>()
                .Single(attribute => attribute.Key == "RolloutProgram").Value!,
            ModelFolder = folder,
            Device = device,
            ExtraArguments = ["--max-sequences", "8", "--kv-cache", "64MiB"],
        }, cancellation);
        await using RolloutClient client = RolloutClient.Connect(server.Address);
        SidecarStatus status = await client.StatusAsync(cancellationToken: cancellation);
        // NCCL needs a device of its own for each rank: the first, while the sidecar has another.
        using TensorMemory memory = TensorMemory.OnDevice(0);
        (DeviceBucket weights, DeviceTensor[] tensors, TensorSource[] sources) = Upload(memory, folder);
        using DeviceBucket held = weights;
        PushOptions options = new()
        {
            Transport = transport switch
            {
                "ipc" => PushTransport.CudaIpc,
                "nccl" => PushTransport.Nccl,
                _ => PushTransport.SharedMemory,
            },
        };
        List<double> toToken = [], push = [], stall = [], copy = [];
        PushResult? last = null;
        long freeAfterFirst = 0;
        // Freed last: the sidecar has opened this process's memory until the publisher is disposed.
        await using WeightPublisher publisher = new(client);
        for (int i = -1; i < repeats; i++)
        {
            long start = Stopwatch.GetTimestamp();
            last = options.Transport == PushTransport.SharedMemory
                ? await publisher.PushAsync(sources, options: options, cancellationToken: cancellation)
                : await publisher.PushAsync(tensors, options: options, cancellationToken: cancellation);
            await FirstTokenAsync(client, i, last.Version, cancellation);
            double seconds = Stopwatch.GetElapsedTime(start).TotalSeconds;
            double copied = Copy(memory, weights);
            if (i < 0)
            {
                freeAfterFirst = (await client.StatusAsync(cancellationToken: cancellation)).Memory.Free;
                continue; // memory is taken at the first
            }

            toToken.Add(seconds);
            push.Add(last.Timings.Total);
            stall.Add(last.Timings.ServerStall);
            copy.Add(copied);
        }

        SidecarStatus end = await client.StatusAsync(cancellationToken: cancellation);
        return new Result(
            status.Backend, last!, Median(toToken), Median(push), Median(stall), Median(copy), freeAfterFirst - end.Memory.Free,
            end.Version == last!.Version);
    }

    /// <exception cref="InvalidOperationException">The token is of another version.</exception>
    private static async Task FirstTokenAsync(RolloutClient client, int id, ulong version, CancellationToken cancellation)
    {
        GenerateOptions one = new() { MaxTokens = 1, IgnoreEos = true };
        await foreach (Sample sample in client.GenerateBatchAsync([new RolloutRequest((int[])[9, 10, 11], one) { RequestId = $"{id}" }],
            cancellationToken: cancellation))
        {
            if (sample.Versions[^1].Version != version)
                throw new InvalidOperationException($"a token of version {sample.Versions[^1].Version} after the commit of {version}");
        }
    }

    private static (DeviceBucket Memory, DeviceTensor[] Tensors, TensorSource[] Sources) Upload(TensorMemory memory, string folder)
    {
        using SafetensorsFile file = SafetensorsFile.Open(Path.Combine(folder, ShapeS.WeightsFile));
        TensorInfo[] all = [.. file.Tensors.Values.OrderBy(tensor => tensor.Offset)];
        DeviceBucket bucket = memory.Allocate(all.Sum(tensor => Aligned(tensor.Bytes)));
        DeviceTensor[] tensors = new DeviceTensor[all.Length];
        TensorSource[] sources = new TensorSource[all.Length];
        long at = 0;
        for (int i = 0; i < all.Length; i++)
        {
            byte[] bytes = new byte[all[i].Bytes];
            file.Read(all[i], 0, bytes);
            bucket.Upload(at, bytes);
            tensors[i] = new DeviceTensor(all[i].Name, TensorDType.BF16, all[i].Shape, bucket.Pointer + (nint)at);
            sources[i] = TensorSource.FromMemory(all[i].Name, TensorDType.BF16, all[i].Shape, bytes);
            at += Aligned(bytes.Length);
        }

        return (bucket, tensors, sources);
    }

    private static double Copy(TensorMemory memory, DeviceBucket from)
    {
        using DeviceBucket to = memory.Allocate(from.Bytes);
        to.CopyFrom(0, from.Pointer, from.Bytes, 0); // the first touch
        memory.Synchronize(0);
        long start = Stopwatch.GetTimestamp();
        to.CopyFrom(0, from.Pointer, from.Bytes, 0);
        memory.Synchronize(0);
        return Stopwatch.GetElapsedTime(start).TotalSeconds;
    }

    private static long TensorBytes(string folder)
    {
        using SafetensorsFile file = SafetensorsFile.Open(Path.Combine(folder, ShapeS.WeightsFile));
        return file.Tensors.Values.Sum(tensor => tensor.Bytes);
    }

    private static long Aligned(long bytes) => (bytes + Alignment - 1) / Alignment * Alignment;

    private static double Median(List<double> values) => values.Order().ElementAt(values.Count / 2);
}
