using System.IO.Hashing;
using Google.Protobuf;
using Grpc.Core;
using Rollout.V1;

namespace Rollout.Client.Tests;

/// <summary>A minimal server side of the weight transaction, with ways to make it fail.</summary>
internal sealed class FakeWeights
{
    private byte[] _payload = [];
    private readonly Queue<V1.SharedMemory> _unread = [];
    private volatile bool _updating;
    private long _taken;
    private int _asked;

    public ulong Version { get; set; }

    public V1.BeginUpdate? Begin { get; private set; }

    public Dictionary<string, byte[]> Tensors { get; } = [];

    public string? SharedMemoryPath { get; private set; }

    public string? AbortReason { get; private set; }

    public int Chunks { get; private set; }

    public int Windows { get; private set; }

    public V1.Problem[] Reject { get; set; } = [];

    public string? FailAtCommit { get; set; }

    /// <summary>After this many chunks the update ends with Failed.</summary>
    public int FailAfterChunks { get; set; } = int.MaxValue;

    /// <summary>The answer to the commit, which is not carried out.</summary>
    public V1.UpdateReply? GivesUp { get; set; }

    /// <summary>Answers with another digest than that of what was received.</summary>
    public bool LieAboutDigest { get; set; }

    /// <summary>Runs instead of answering the commit: with whether to commit first.</summary>
    public Func<ServerCallContext, Task>? BreakAtCommit { get; set; }

    public bool CommitBeforeBreaking { get; set; }

    /// <summary>Runs before Ready is sent.</summary>
    public Func<ServerCallContext, Task>? BeforeReady { get; set; }

    /// <summary>Runs when a message of an update has arrived, before anything is done with it.</summary>
    public Func<V1.UpdateRequest, ServerCallContext, Task>? Arrived { get; set; }

    /// <summary>Runs when a message of an update has been handled, before it is answered.</summary>
    public Func<V1.UpdateRequest, ServerCallContext, Task>? Done { get; set; }

    /// <summary>What Ready says.</summary>
    public V1.UpdateMode Mode { get; set; } = V1.UpdateMode.Staged;

    /// <summary>Payload bytes read so far, as in the last progress or the one about to be sent.</summary>
    public long Taken => Interlocked.Read(ref _taken);

    /// <summary>This many windows are left unread as long as more of the payload is expected.</summary>
    public int WindowsBehind { get; set; }

    /// <summary>In place, after the first byte: until a full update commits.</summary>
    public bool Poisoned { get; set; }

    /// <summary>Replaces the status reply, by the number of the call, from 1 on.</summary>
    public Func<int, V1.StatusReply>? Says { get; set; }

    public V1.StatusReply Status()
    {
        int asked = Interlocked.Increment(ref _asked);
        if (Says is { } says)
            return says(asked);
        V1.EngineState state = Poisoned ? V1.EngineState.Poisoned : V1.EngineState.Running;
        return new() { State = state, Version = Version, Updating = _updating };
    }

    public string DigestAlgorithm { get; set; } = "xxh3-128-tree-131072";

    /// <summary>Of a tensor, as DEFINITIONS.md defines it.</summary>
    public static byte[] DigestOf(byte[] tensor) => XxHash128.Hash([.. tensor.Chunk(131072).SelectMany(piece => XxHash128.Hash(piece))]);

    public V1.DescribeReply Describe()
    {
        DescribeReply reply = new() { Version = Version, DigestAlgorithm = DigestAlgorithm };
        foreach ((string name, byte[] bytes) in Tensors)
        {
            reply.Tensors.Add(new V1.DescribedTensor
            {
                Name = name,
                Dtype = V1.TensorDType.Bf16,
                Shape = { (ulong)bytes.Length / 2 },
                Digest = ByteString.CopyFrom(DigestOf(bytes)),
            });
        }

        return reply;
    }

    public async Task UpdateAsync(
        IAsyncStreamReader<V1.UpdateRequest> requests, IServerStreamWriter<V1.UpdateReply> replies, ServerCallContext context)
    {
        _updating = true;
        _taken = 0;
        _unread.Clear();
        bool inPlace = false; // whether bytes have been written to the weights in service
        try
        {
            while (await requests.MoveNext())
            {
                V1.UpdateRequest request = requests.Current;
                if (Arrived is not null)
                    await Arrived(request, context);
                inPlace |= Mode == V1.UpdateMode.InPlace && request.StepCase != V1.UpdateRequest.StepOneofCase.Begin;
                V1.UpdateReply? reply = await StepAsync(request, context);
                inPlace &= reply?.StepCase != V1.UpdateReply.StepOneofCase.Committed;
                Poisoned &= reply?.StepCase != V1.UpdateReply.StepOneofCase.Committed;
                if (Done is not null)
                    await Done(request, context);
                if (reply is not null)
                    await replies.WriteAsync(reply);
                if (reply?.StepCase is not (null or V1.UpdateReply.StepOneofCase.Ready or V1.UpdateReply.StepOneofCase.Progress))
                    return;
            }
        }
        finally
        {
            Poisoned |= inPlace;
            _updating = false;
        }
    }

    private async Task<V1.UpdateReply?> StepAsync(V1.UpdateRequest request, ServerCallContext context)
    {
        switch (request.StepCase)
        {
            case V1.UpdateRequest.StepOneofCase.Begin:
                Begin = request.Begin;
                V1.Problem[] problems = Begin.BaseVersion == Version
                    ? Reject
                    : [new V1.Problem { Field = "base_version", Message = $"{Begin.BaseVersion} given, {Version} is served" }];
                if (problems.Length > 0)
                    return new V1.UpdateReply { Rejected = new V1.Rejected { Problems = { problems } } };
                _payload = new byte[Begin.PayloadBytes];
                if (BeforeReady is not null)
                    await BeforeReady(context);
                return new V1.UpdateReply { Ready = new V1.Ready { Mode = Mode } };

            case V1.UpdateRequest.StepOneofCase.Chunk:
                request.Chunk.Data.Span.CopyTo(_payload.AsSpan((int)request.Chunk.Offset));
                int received = (int)request.Chunk.Offset + request.Chunk.Data.Length;
                return ++Chunks >= FailAfterChunks ? Failed("out of luck") : Progress(received);

            case V1.UpdateRequest.StepOneofCase.SharedMemory:
                SharedMemoryPath = request.SharedMemory.Path;
                Windows++;
                _unread.Enqueue(request.SharedMemory);
                bool all = (int)(request.SharedMemory.PayloadOffset + request.SharedMemory.Bytes) == _payload.Length;
                if (!all && _unread.Count <= WindowsBehind)
                    return null;
                if (!all && WindowsBehind > 0)
                    await Task.Delay(10); // gives a client that does not wait time to fail
                int end = 0;
                while (_unread.Count > (all ? 0 : WindowsBehind))
                    end = Read(_unread.Dequeue());
                return Progress(end);

            case V1.UpdateRequest.StepOneofCase.File:
                await using (FileStream file = File.OpenRead(request.File.Path))
                {
                    file.Position = file.Length - _payload.Length;
                    file.ReadExactly(_payload);
                }

                return Progress(_payload.Length);

            case V1.UpdateRequest.StepOneofCase.Commit:
                return await CommitAsync(request.Commit, context);

            default:
                AbortReason = request.Abort.Reason;
                return new V1.UpdateReply { Aborted = new V1.Aborted { Reason = AbortReason } };
        }
    }

    private async Task<V1.UpdateReply> CommitAsync(V1.Commit commit, ServerCallContext context)
    {
        if (GivesUp is not null)
            return GivesUp;
        if (FailAtCommit is not null)
            return Failed(FailAtCommit);
        if (BreakAtCommit is null || CommitBeforeBreaking)
        {
            Version = Begin!.NewVersion;
            foreach (V1.ManifestTensor tensor in Begin.Manifest)
            {
                int size = (int)tensor.Shape.Aggregate(1UL, (a, b) => a * b) * (tensor.Dtype == V1.TensorDType.F32 ? 4 : 2);
                if (tensor.HasSparseCount)
                    size = (int)tensor.SparseCount * 6;
                Tensors[tensor.Name] = _payload.AsSpan((int)tensor.Offset, size).ToArray();
            }
        }

        if (BreakAtCommit is not null)
        {
            _updating = false;
            await BreakAtCommit(context);
        }

        XxHash128 all = new();
        foreach (V1.ManifestTensor tensor in Begin!.Manifest)
            all.Append(DigestOf(Tensors[tensor.Name]));
        if (LieAboutDigest)
            all.Append([1]);
        byte[] digest = all.GetCurrentHash();
        if (!LieAboutDigest && commit.Digest.Length > 0 && !commit.Digest.Span.SequenceEqual(digest))
            return Failed("the digests differ");
        UpdateTimings timings = new() { TransferSeconds = 0.5, SwapSeconds = 0.25, StallSeconds = 0.125 };
        return new V1.UpdateReply
        {
            Committed = new V1.Committed { Version = Version, Digest = ByteString.CopyFrom(digest), Timings = timings },
        };
    }

    private static V1.UpdateReply Failed(string reason) => new() { Failed = new V1.UpdateFailed { Reason = reason } };

    private int Read(V1.SharedMemory window)
    {
        using FileStream file = File.OpenRead(window.Path);
        file.Position = (long)window.Offset;
        file.ReadExactly(_payload, (int)window.PayloadOffset, (int)window.Bytes);
        return (int)(window.PayloadOffset + window.Bytes);
    }

    private V1.UpdateReply Progress(int bytes)
    {
        Interlocked.Exchange(ref _taken, bytes);
        return new() { Progress = new V1.Progress { PayloadBytes = (ulong)bytes } };
    }
}
