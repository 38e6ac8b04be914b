using System.Diagnostics;
using System.IO.Hashing;
using System.Runtime.InteropServices;
using System.Security.Cryptography;
using System.Text.Json;
using Rollout.Client;
using Rollout.Engine;
using Rollout.Kernels;
using Rollout.Kernels.Cuda;
using Rollout.Micro;
using Rollout.Native;
using DeviceTensor = Rollout.Kernels.Cuda.DeviceTensor;

namespace Rollout.Gpu;

/// <summary>
/// Stage 5: device memory of another process, PyTorch's where that is installed, checked and made weights; updates of a sidecar through
/// shared memory; and a trainer in Python against a sidecar.
/// </summary>
internal static class Updates
{
    private const string Ipc = "Memory of another process (CUDA IPC)";

    public static IReadOnlyList<Part> Parts { get; } =
    [
        new("memory of another process", 40, PeerAsync),
        new("pushes through shared memory", 40, PushesAsync),
        new("pushes from the same GPU", 40, PushesFromDeviceAsync),
        new("trainer in Python", 60, TrainAsync),
    ];

    /// <summary>What the other process reports of one tensor: a handle of its allocation, and the tensor's offset in it.</summary>
    private sealed record Shared(string Who, string Handle, long Offset, long Bytes, string Sha256);

    private static async Task PeerAsync(Stage stage)
    {
        ModelSpec model = Shapes.Load(Shapes.Qwen25, stage.IsSmall);
        LoadPlan plan = LoadPlan.Compile(model);
        LoadEntry[] entries = [.. plan.Entries.Where(entry => !entry.Tied)];
        long bytes = entries.Sum(entry => entry.Elements) * sizeof(ushort);
        using CudaBackend backend = new();
        using Process other = await StartAsync(stage, bytes);
        try
        {
            Shared inside = await ReadAsync(other), all = await ReadAsync(other);
            using DeviceBytes small = Open(backend, inside);
            stage.Try(Ipc, "a tensor inside an allocation", () =>
            {
                Check(backend, small, inside);
                stage.Write(Ipc, "a tensor inside an allocation", "result",
                    $"{inside.Who}: {inside.Bytes} bytes at offset {inside.Offset}, SHA-256 and XXH3-128 equal");
            });
            using DeviceBytes large = Open(backend, all);
            stage.Try(Ipc, "a whole model", () =>
            {
                Check(backend, large, all);
                Measure("digest as one tensor, GB/s", [new DeviceTensor(large, all.Offset, all.Bytes, DType.BFloat16, [])]);
                Measure("digest tensor by tensor, GB/s", Tensors(large, all.Offset, entries, weights: null));

                void Measure(string column, IReadOnlyList<DeviceTensor> tensors)
                {
                    _ = backend.Peers.Apply(tensors); // memory for the table is taken at the first
                    long start = Stopwatch.GetTimestamp();
                    _ = backend.Peers.Apply(tensors);
                    stage.Write(Ipc, "a whole model", column, bytes / Stopwatch.GetElapsedTime(start).TotalSeconds / 1e9);
                }
            });
            stage.Try("Weight updates", "IPC", () =>
            {
                using WeightSet one = RandomWeights.Of(backend, model, stage.IsSmall);
                using WeightSet two = WeightSet.Allocate(backend, plan);
                int times = stage.IsSmall ? 3 : 200;
                Report(stage, "copy on the device, weight by weight", bytes, Times(times, () =>
                {
                    foreach ((Weight from, Weight to) in one.All.Zip(two.All)) backend.CopyWeight(from, to);
                }));
                IReadOnlyList<DeviceTensor> tensors = Tensors(large, all.Offset, entries, two);
                string row = $"memory of another process ({all.Who}), digests included";
                Report(stage, row, bytes, Times(times, () => backend.Peers.Apply(tensors)));
            });
            stage.Try("Weight updates", "one copy", () =>
            {
                using DeviceBuffer from = backend.Device.AllocateZeroed(bytes), to = backend.Device.Allocate(bytes);
                double seconds = DeviceClock.Seconds(backend.Device, 5, 5, () => DeviceClock.Copy(backend.Device, from, to));
                Report(stage, "one copy of the same bytes on the device", bytes, [seconds]);
            });
        }
        finally
        {
            other.StandardInput.Close(); // the other process may end
            if (!other.WaitForExit(TimeSpan.FromSeconds(5))) other.Kill();
        }
    }

    /// <summary>
    /// Staged, through shared memory, by the .NET client: from "push" to "committed", and to the first token of the new policy.
    /// </summary>
    private static async Task PushesAsync(Stage stage)
    {
        await using Served served = await Served.StartAsync(stage);
        await using WeightPublisher publisher = new(served.Client);
        await MeasureAsync(stage, served.Client, "shared memory, staged", () => publisher.PushAsync(served.Tensors));
    }

    /// <summary>By CUDA IPC: this process is the trainer, with all weights in one allocation on the sidecar's device.</summary>
    private static async Task PushesFromDeviceAsync(Stage stage)
    {
        await using Served served = await Served.StartAsync(stage);
        using TensorMemory memory = TensorMemory.OnDevice(0);
        using SafetensorsFile file = SafetensorsFile.Open(Path.Combine(served.Folder, Served.WeightsFile));
        using DeviceBucket weights = memory.Allocate(file.DataBytes + 256L * file.Tensors.Count);
        List<Rollout.Client.DeviceTensor> tensors = [];
        long at = 0;
        foreach (TensorInfo tensor in file.Tensors.Values.OrderBy(tensor => tensor.Offset))
        {
            byte[] bytes = new byte[tensor.Bytes];
            file.Read(tensor, 0, bytes);
            weights.Upload(at, bytes);
            tensors.Add(new Rollout.Client.DeviceTensor(tensor.Name, TensorDType.BF16, tensor.Shape, weights.Pointer + (nint)at));
            at += (bytes.Length + 255) / 256 * 256;
        }

        // Disposed before the memory that the sidecar has opened.
        await using WeightPublisher publisher = new(served.Client);
        foreach ((string name, PushOptions options) in ((string, PushOptions)[])
            [
                ("CUDA IPC, staged", new PushOptions { Mode = Rollout.Client.UpdateMode.Staged }),
                ("CUDA IPC, in place", new PushOptions { Mode = Rollout.Client.UpdateMode.InPlace }),
            ])
        {
            PushCounts counts = await MeasureAsync(stage, served.Client, name, () => publisher.PushAsync(tensors, options: options));
            stage.Write("Weight updates", name, "of a push after the first", $"{counts}");
        }
    }

    /// <returns>What the last push cost.</returns>
    private static async Task<PushCounts> MeasureAsync(Stage stage, RolloutClient client, string name, Func<Task<PushResult>> push)
    {
        List<double> total = [], toToken = [], write = [], transfer = [], stall = [];
        RolloutRequest oneToken = new((int[])[9, 10, 11], new GenerateOptions { MaxTokens = 1, IgnoreEos = true });
        PushResult? last = null;
        for (int i = -1; i < (stage.IsSmall ? 2 : 15); i++)
        {
            long start = Stopwatch.GetTimestamp();
            last = await push();
            await foreach (Sample sample in client.GenerateBatchAsync([oneToken with { RequestId = $"{name} {i}" }]))
            {
                if (sample.Versions[^1].Version is var version && version != last.Version)
                    throw new InvalidOperationException($"a token of version {version} after the commit of {last.Version}");
            }

            if (i < 0) continue; // memory is taken at the first
            toToken.Add(Stopwatch.GetElapsedTime(start).TotalSeconds);
            total.Add(last.Timings.Total);
            write.Add(last.Timings.Write);
            transfer.Add(last.Timings.ServerTransfer);
            stall.Add(last.Timings.ServerStall);
        }

        Report(stage, $"{name}, push to first token", last!.PayloadBytes, [.. toToken]);
        Report(stage, $"{name}, push to committed", last.PayloadBytes, [.. total]);
        Report(stage, $"{name}, of it: the client", last.PayloadBytes, [.. write]);
        Report(stage, $"{name}, of it: the sidecar reads, checks and stores", last.PayloadBytes, [.. transfer]);
        Report(stage, $"{name}, no step could run for", last.PayloadBytes, [.. stall]);
        return last.Counts;
    }

    /// <summary>
    /// Runs examples/python/grpo.py with a sidecar on the device: the sampled log-probabilities must equal the trainer's within the error
    /// of bf16.
    /// </summary>
    private static async Task TrainAsync(Stage stage)
    {
        IReadOnlyList<string> lines = await Python.RunAsync("trainer.py", stage.IsSmall
            ? ["--steps", "1", "--warm-steps", "1", "--samples", "2"]
            : ["--steps", "12", "--warm-steps", "60"]);
        string[] steps = [.. lines.Where(line => line.StartsWith("step ", StringComparison.Ordinal))];
        if (steps.Length == 0)
        {
            stage.Write("Trainer in Python", "examples/python/grpo.py", "result", lines.Count == 0 ? "no output" : lines[^1]);
            return;
        }

        stage.Write("Trainer in Python", "first step", "result", steps[0]);
        stage.Write("Trainer in Python", "last step", "result", steps[^1]);
    }

    /// <summary>
    /// The other process where PyTorch is not installed: `share`, which reads the bytes of the large tensor from its first line of input.
    /// </summary>
    public static void Share()
    {
        long bytes = long.Parse(Console.ReadLine()!, System.Globalization.CultureInfo.InvariantCulture);
        using CudaDevice device = new(0);
        byte[] pattern = MemoryMarshal.AsBytes<ushort>(Workload.RandomBFloat16(4096)).ToArray();
        const int Offset = 512;
        using DeviceBuffer inside = device.AllocateZeroed(Offset + pattern.Length), all = device.AllocateZeroed(bytes);
        device.Upload(inside.Pointer + Offset, pattern);
        byte[] zeros = new byte[bytes];
        Say(inside, Offset, pattern);
        Say(all, 0, zeros);
        _ = Console.ReadLine(); // until it is closed

        static void Say(DeviceBuffer buffer, long offset, byte[] bytes)
        {
            CUipcMemHandle handle = buffer.Share();
            Shared shared = new(
                "Rollout", Convert.ToHexString(MemoryMarshal.AsBytes(new ReadOnlySpan<CUipcMemHandle>(ref handle))), offset, bytes.Length,
                Convert.ToHexString(SHA256.HashData(bytes)));
            Console.WriteLine(JsonSerializer.Serialize(shared, JsonSerializerOptions.Web));
        }
    }

    /// <summary>Starts PyTorch, or, where that has no GPU, this program.</summary>
    private static async Task<Process> StartAsync(Stage stage, long bytes)
    {
        bool torch = !stage.IsSmall && await Python.HasAsync("torch");
        Process process = Process.Start(new ProcessStartInfo(
            torch ? "python3" : Environment.ProcessPath!, torch ? [Python.Script("share.py")] : [.. Stage.Self, "share"])
        {
            RedirectStandardInput = true,
            RedirectStandardOutput = true,
        })!;
        await process.StandardInput.WriteLineAsync($"{bytes}");
        return process;
    }

    private static async Task<Shared> ReadAsync(Process process)
    {
        while (await process.StandardOutput.ReadLineAsync() is { } line)
        {
            if (line.StartsWith('{')) return JsonSerializer.Deserialize<Shared>(line, JsonSerializerOptions.Web)!;
        }

        throw new InvalidOperationException("the other process ended before it had shared its memory");
    }

    private static DeviceBytes Open(CudaBackend backend, Shared shared) => backend.Peers.Open(Convert.FromHexString(shared.Handle));

    /// <summary>Tensors of bf16 that stand one after the other, to be stored, or hashed alone where there are no weights.</summary>
    private static IReadOnlyList<DeviceTensor> Tensors(DeviceBytes memory, long offset, LoadEntry[] entries, WeightSet? weights)
    {
        List<DeviceTensor> tensors = [];
        foreach (LoadEntry entry in entries)
        {
            WeightRange[] stores = weights is null ? []
                : [.. entry.Pieces.Select(piece => new WeightRange(piece.First, piece.Elements, weights[piece.Slot], piece.Destination))];
            tensors.Add(new DeviceTensor(memory, offset, entry.Elements * sizeof(ushort), DType.BFloat16, stores));
            offset += entry.Elements * sizeof(ushort);
        }

        return tensors;
    }

    private static void Check(CudaBackend backend, DeviceBytes memory, Shared shared)
    {
        byte[] read = new byte[shared.Bytes];
        backend.Device.Download(memory.Pointer + (nuint)shared.Offset, read);
        if (!Convert.ToHexString(SHA256.HashData(read)).Equals(shared.Sha256, StringComparison.OrdinalIgnoreCase))
            throw new InvalidOperationException("the bytes read are not those that were shared");
        byte[] found = backend.Peers.Apply([new DeviceTensor(memory, shared.Offset, shared.Bytes, DType.BFloat16, [])]);
        byte[] wanted = [.. read.Chunk(TensorDigest.PieceBytes).SelectMany(piece => XxHash128.Hash(piece))];
        if (!found.AsSpan().SequenceEqual(wanted)) throw new InvalidOperationException("the device's XXH3-128 is not the host's");
    }

    private static double[] Times(int count, Action work)
    {
        double[] seconds = new double[count];
        work();
        for (int i = 0; i < count; i++)
        {
            long start = Stopwatch.GetTimestamp();
            work();
            seconds[i] = Stopwatch.GetElapsedTime(start).TotalSeconds;
        }

        return seconds;
    }

    private static void Report(Stage stage, string row, long bytes, double[] seconds)
    {
        string table = $"Weight updates, {Shapes.Qwen25}";
        double[] sorted = [.. seconds.Order()];
        stage.Write(table, row, "p50, ms", sorted[sorted.Length / 2] * 1e3);
        stage.Write(table, row, "p99, ms", sorted[(int)Math.Ceiling(0.99 * sorted.Length) - 1] * 1e3);
        stage.Write(table, row, "GB/s", bytes / sorted[sorted.Length / 2] / 1e9);
        stage.Write(table, row, "updates", seconds.Length);
    }
}
