using System.Diagnostics;
using System.Runtime.InteropServices;
using Rollout.Client;
using Rollout.Engine;
using Rollout.Kernels;
using Rollout.Micro;

namespace Rollout.Gpu;

/// <summary>A sidecar with the shape of Qwen2.5-0.5B on the device, used through gRPC.</summary>
internal sealed class Served : IAsyncDisposable
{
    private readonly SidecarProcess _sidecar;
    private readonly string _folder;

    private Served(SidecarProcess sidecar, string folder, IReadOnlyList<TensorSource> tensors)
    {
        _sidecar = sidecar;
        _folder = folder;
        Tensors = tensors;
        Client = sidecar.Connect();
    }

    public const string WeightsFile = "model.safetensors";

    public RolloutClient Client { get; }

    /// <summary>The model's.</summary>
    public string Folder => _folder;

    /// <summary>Weights of the model as it was loaded.</summary>
    public IReadOnlyList<TensorSource> Tensors { get; }

    /// <summary>The GRPO rollout of <see cref="Rollouts.Grpo"/>, requested as a trainer does.</summary>
    public static async Task RunAsync(Stage stage)
    {
        await using Served served = await StartAsync(stage);
        ModelSpec model = Shapes.Load(Shapes.Qwen25, stage.IsSmall);
        for (int run = 1; run <= 2; run++)
        {
            RolloutRequest[] requests = [.. Rollouts.Grpo(stage.IsSmall, run, model).Select(AsTrainersSend)];
            long start = Stopwatch.GetTimestamp();
            double tokens = 0, samples = 0;
            await foreach (Sample sample in served.Client.GenerateBatchAsync(requests))
            {
                if (sample.Error.Length > 0) throw new InvalidOperationException(sample.Error);
                (tokens, samples) = (tokens + sample.Ids.Length, samples + 1);
            }

            double taken = Stopwatch.GetElapsedTime(start).TotalSeconds;
            string row = $"{Shapes.Qwen25}, GRPO 64 x 16, run {run}, through gRPC";
            stage.Write(Rollouts.Table, row, "seconds", taken, 1.6);
            stage.Write(Rollouts.Table, row, "tokens/s", tokens / taken);
            stage.Write(Rollouts.Table, row, "mean length", tokens / samples);
        }
    }

    private static RolloutRequest AsTrainersSend(GroupRequest request) => new(request.Prompt, new GenerateOptions
    {
        N = request.N,
        Seed = request.Seed,
        MaxTokens = request.MaxTokens!.Value,
        StopTokenIds = request.StopTokenIds,
        LogitBias = request.LogitBias,
        IgnoreEos = true,
    });

    /// <summary>Writes the model to memory or disk, and serves it.</summary>
    public static async Task<Served> StartAsync(Stage stage)
    {
        ModelSpec model = Shapes.Load(Shapes.Qwen25, stage.IsSmall);
        string folder = Directory.CreateDirectory(Path.Combine(ScratchFolder(), $"rollout-gpu-{Environment.ProcessId}")).FullName;
        try
        {
            File.Copy(Path.Combine(Shapes.Folder(Shapes.Qwen25, stage.IsSmall), "config.json"), Path.Combine(folder, "config.json"));
            IReadOnlyList<TensorSource> tensors = Write(model, Path.Combine(folder, WeightsFile));
            SidecarProcess sidecar = await SidecarProcess.StartAsync(new SidecarOptions
            {
                Program = Path.Combine(Stage.Root, "server", "rollout.dll"),
                ModelFolder = folder,
                Device = "cuda",
                ExtraArguments = stage.IsSmall
                    ? ["--max-context", "64", "--max-sequences", "16", "--max-batch-tokens", "64"]
                    : ["--max-context", "1280", "--max-sequences", "1024", "--kv-cache", "60%"],
                StopTimeout = TimeSpan.FromSeconds(5),
            });
            return new Served(sidecar, folder, tensors);
        }
        catch
        {
            Directory.Delete(folder, recursive: true);
            throw;
        }
    }

    public async ValueTask DisposeAsync()
    {
        await Client.DisposeAsync();
        await _sidecar.DisposeAsync();
        Directory.Delete(_folder, recursive: true);
    }

    /// <summary>/dev/shm where the model fits, since that is memory.</summary>
    private static string ScratchFolder()
    {
        const string Memory = "/dev/shm";
        return Directory.Exists(Memory) && new DriveInfo(Memory).AvailableFreeSpace > 4L << 30 ? Memory : Path.GetTempPath();
    }

    private static List<TensorSource> Write(ModelSpec model, string file)
    {
        TensorDeclaration[] tensors =
            [.. model.CheckpointTensors().Select(tensor => new TensorDeclaration(tensor.Name, DType.BFloat16, tensor.Shape))];
        byte[] all = new byte[tensors.Sum(tensor => tensor.Bytes)];
        ReadOnlySpan<byte> pattern = MemoryMarshal.AsBytes<ushort>(Workload.RandomBFloat16(1_000_003));
        ReadOnlySpan<byte> one = [0x80, 0x3F]; // 1 in bf16
        List<TensorSource> sources = [];
        using SafetensorsWriter writer = new(file, tensors);
        int start = 0;
        foreach (TensorDeclaration tensor in tensors)
        {
            Memory<byte> bytes = all.AsMemory(start, (int)tensor.Bytes);
            ReadOnlySpan<byte> source = tensor.Name.EndsWith("norm.weight", StringComparison.Ordinal) ? one : pattern;
            for (int at = 0; at < bytes.Length; at += source.Length)
                source[..Math.Min(source.Length, bytes.Length - at)].CopyTo(bytes.Span[at..]);
            writer.Write(bytes.Span);
            sources.Add(TensorSource.FromMemory(tensor.Name, TensorDType.BF16, tensor.Shape, bytes));
            start += bytes.Length;
        }

        writer.Complete();
        return sources;
    }
}
