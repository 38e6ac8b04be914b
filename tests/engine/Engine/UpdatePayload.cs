using Microsoft.Win32.SafeHandles;
using Rollout.Kernels;
using Rollout.Native;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>New weights for a golden model: its own, some of them scaled, as a payload and as a folder to load.</summary>
internal sealed class UpdatePayload : IDisposable
{
    private readonly List<ManifestTensor> _tensors = [];

    public required string Folder { get; init; }

    public byte[] Bytes { get; private set; } = [];

    public byte[] Digest { get; private set; } = [];

    public UpdateManifest Manifest(ulong from, ulong to)
        => new() { Tensors = _tensors, PayloadBytes = Bytes.Length, BaseVersion = from, NewVersion = to };

    public static UpdatePayload Of(string family)
    {
        string folder = Directory.CreateTempSubdirectory("rollout-test-").FullName;
        File.Copy(Path.Combine(TestModels.Folder(family), "config.json"), Path.Combine(folder, "config.json"));
        UpdatePayload payload = new() { Folder = folder };
        using Checkpoint checkpoint = Checkpoint.Open(TestModels.Folder(family));
        MemoryStream stream = new();
        List<(TensorDeclaration, byte[])> written = [];
        List<byte[]> digests = [];
        foreach ((string name, CheckpointTensor tensor) in checkpoint.Tensors.OrderBy(entry => entry.Key, StringComparer.Ordinal))
        {
            byte[] bytes = new byte[tensor.Info.Bytes];
            tensor.Read(0, bytes);
            if (name.Contains("mlp.down_proj", StringComparison.Ordinal) || name.Contains("q_proj", StringComparison.Ordinal))
                for (int i = 1; i < bytes.Length; i += 6) bytes[i] ^= 0x80; // the sign of every third bf16
            while (stream.Length % 256 != 0) stream.WriteByte(0xAA);
            payload._tensors.Add(new ManifestTensor(name, DType.BFloat16, tensor.Info.Shape, stream.Length));
            stream.Write(bytes);
            written.Add((new TensorDeclaration(name, DType.BFloat16, tensor.Info.Shape), bytes));
            digests.Add(TensorDigest.Of(bytes));
        }

        SafetensorsWriter.Write(Path.Combine(folder, "model.safetensors"), written);
        payload.Bytes = stream.ToArray();
        payload.Digest = WeightUpdate.Combine(digests);
        return payload;
    }

    public void Dispose() => Directory.Delete(Folder, recursive: true);
}

internal static class UpdateExtensions
{
    /// <summary>Begins and opens an update.</summary>
    public static async Task<WeightUpdate> OpenUpdateAsync(this RolloutEngine engine, UpdateManifest manifest)
    {
        WeightUpdate update = engine.BeginUpdate(manifest);
        await update.OpenAsync(TestContext.Current.CancellationToken);
        return update;
    }

    public static void Write(this WeightUpdate update, long payloadOffset, ReadOnlySpan<byte> bytes)
    {
        using MemorySource source = new(bytes.ToArray(), payloadOffset);
        update.ReadFrom(source, default);
    }

    public static void ReadFrom(
        this WeightUpdate update, SafeFileHandle file, long fileOffset, long payloadOffset, long length, CancellationToken cancellation)
    {
        using FileSource source = new(file, fileOffset, payloadOffset, length);
        update.ReadFrom(source, cancellation);
    }

    public static void ReadFrom(
        this WeightUpdate update, SealedMemory memory, long memoryOffset, long payloadOffset, long length, CancellationToken cancellation)
    {
        using SharedMemorySource source = new(memory, memoryOffset, payloadOffset, length);
        update.ReadFrom(source, cancellation);
    }

    private static void ReadFrom(this WeightUpdate update, PayloadSource source, CancellationToken cancellation)
        => update.Parts[0].ReadFromAsync(source, cancellation).GetAwaiter().GetResult();

    /// <summary>Submits a group, commits the update after this many of its steps, and returns the group when it has ended.</summary>
    public static async Task<Group> UpdateWhileAsync(
        this RolloutEngine engine, ScriptedBackend backend, UpdatePayload payload, UpdatePolicy policy, GroupRequest request, int heldAfter)
    {
        CancellationToken cancelled = TestContext.Current.CancellationToken;
        using WeightUpdate update = await engine.OpenUpdateAsync(payload.Manifest(0, 1) with { Policy = policy });
        update.Write(0, payload.Bytes);
        backend.HoldAfter(heldAfter + backend.StepsInFlight - 2); // the step that is held ends before the pause
        Group group = engine.Submit(request);
        backend.WaitUntilHeld();
        Task paused = engine.PauseAsync(PauseMode.Keep, "the test", TimeSpan.FromMinutes(10), cancelled);
        backend.LetGo();
        await paused;
        Task committed = update.CommitAsync(payload.Digest, cancelled);
        if (policy != UpdatePolicy.Drain) await committed;
        await engine.ResumeAsync();
        await group.Completed.WaitAsync(TimeSpan.FromSeconds(30), cancelled);
        await committed.WaitAsync(TimeSpan.FromSeconds(30), cancelled);
        return group;
    }
}
