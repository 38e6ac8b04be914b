using Google.Protobuf;
using Grpc.Core;
using Rollout.Engine;
using Rollout.Native;
using Rollout.Server.Grpc;
using Rollout.V1;

namespace Rollout.Server.Weights;

/// <summary>One stream of an update: the client's messages and the server's replies, and the payload of the part that it brings.</summary>
internal sealed class PartStream(
    RolloutEngine engine, SharedSegment shared, OpenMemory memory, IAsyncStreamReader<UpdateRequest> requests,
    IServerStreamWriter<UpdateReply> replies)
    : IDisposable
{
    private static readonly TimeSpan s_lastReplyWithin = TimeSpan.FromSeconds(5);

    /// <summary>Progress is reported about this often, so that small chunks do not cause many replies.</summary>
    private const long ProgressBytes = 16 << 20;

    private readonly Dictionary<UpdateRequest.StepOneofCase, ITransport> _transports = [];
    private SealedMemory? _segment;
    private int _part;
    private long _reported;

    /// <summary>The client's last message.</summary>
    public UpdateRequest Current => requests.Current;

    /// <summary>Device memory of other processes that was opened for it.</summary>
    public int HandlesOpened => _transports.Values.OfType<CudaIpcTransport>().Sum(transport => transport.Opened);

    /// <summary>The client's next message. False when it has closed its side.</summary>
    public async Task<bool> MoveNextAsync(CancellationToken cancellation)
    {
        try
        {
            return await requests.MoveNext(cancellation);
        }
        catch (IOException)
        {
            throw ClientGone(); // there are several exceptions for a broken stream, some of them before the call is cancelled
        }
    }

    /// <summary>Answers Ready, with shared memory of this size at best.</summary>
    public Task ReadyAsync(WeightUpdate update, int part, ulong segmentBytes, ReadOnlyMemory<byte> id, CancellationToken cancellation)
    {
        _part = part;
        _segment = shared.Lend(part, segmentBytes, () => engine.Backend.AvailableBytes);
        Ready ready = new()
        {
            StagingBytes = (ulong)update.StagingBytes,
            Mode = ManifestConverter.ToWire(update.Mode),
            Segment = ToWire(_segment),
            UpdateId = ByteString.CopyFrom(id.Span),
        };
        if (engine.Backend.Peers is { } peers)
        {
            ready.DeviceUuid = ByteString.CopyFrom(peers.DeviceUuid.Span);
            ready.NcclUniqueId = memory.Ranks.Id;
        }

        return ReplyAsync(new UpdateReply { Ready = ready }, cancellation);
    }

    public static bool IsPayload(UpdateRequest request) => request.StepCase
        is UpdateRequest.StepOneofCase.Chunk or UpdateRequest.StepOneofCase.SharedMemory or UpdateRequest.StepOneofCase.File
        or UpdateRequest.StepOneofCase.CudaIpc or UpdateRequest.StepOneofCase.Nccl;

    /// <summary>Reads what a payload message brings.</summary>
    public async Task ReceiveAsync(UpdateRequest request, WeightUpdate update, UpdatePart part, CancellationToken cancellation)
    {
        bool chunk = request.StepCase == UpdateRequest.StepOneofCase.Chunk;
        if (!chunk || ChunkBuffer.Behind(request.Chunk.Data) is null) RefuseUnknownFields(request);
        if (!_transports.TryGetValue(request.StepCase, out ITransport? transport))
            _transports.Add(request.StepCase, transport = Transport(request.StepCase));
        using (PayloadSource source = await transport.SourceOfAsync(request, part, cancellation))
        {
            await update.OpenAsync(cancellation);
            await part.ReadFromAsync(source, cancellation);
        }

        // After a window its memory may be overwritten, so it gets a reply; small chunks do not get one each.
        long received = part.ReceivedBytes;
        if (chunk && received < _reported + ProgressBytes && received < part.PayloadBytes) return;
        _reported = received;
        await ReplyAsync(new UpdateReply { Progress = new Progress { PayloadBytes = (ulong)received } }, cancellation);
    }

    public static void RefuseUnknownFields(UpdateRequest request)
    {
        ProblemList unknown = UnknownFields.Of(request);
        if (unknown.Count > 0) throw Failed(unknown.ToString());
    }

    /// <summary>Gives back what it has borrowed: before the update ends, since the next one may need it.</summary>
    public void Dispose()
    {
        if (_segment is not null) shared.GiveBack(_part);
        _segment = null;
        foreach (ITransport transport in _transports.Values) transport.Dispose();
        _transports.Clear();
    }

    /// <summary>Sends the last reply.</summary>
    public async Task LastReplyAsync(UpdateReply reply)
    {
        try
        {
            await replies.WriteAsync(reply, CancellationToken.None).WaitAsync(s_lastReplyWithin);
        }
        catch (Exception e) when (e is TimeoutException or InvalidOperationException)
        {
            // The client has stopped reading; only the status may still reach it.
            throw new RpcException(new Status(StatusCode.Aborted, reply.ToString()));
        }
    }

    public static RpcException ClientGone() => new(new Status(StatusCode.Cancelled, "the client has disconnected"));

    public static string ReasonOf(AbortUpdate abort) => abort.Reason.Length > 0 ? abort.Reason : "the client said so";

    public static UpdateFailedException Failed(string reason) => new(UpdateFailure.Protocol, reason);

    public static string Name(UpdateRequest request)
        => request.StepCase == UpdateRequest.StepOneofCase.None ? "a message this server does not know"
            : request.StepCase.ToString().ToLowerInvariant();

    private ITransport Transport(UpdateRequest.StepOneofCase step) => step switch
    {
        UpdateRequest.StepOneofCase.Chunk => new InlineTransport(),
        UpdateRequest.StepOneofCase.SharedMemory => new SharedMemoryTransport(_segment),
        UpdateRequest.StepOneofCase.File => new SafetensorsTransport(),
        UpdateRequest.StepOneofCase.CudaIpc => new CudaIpcTransport(engine.Backend, memory),
        _ => new NcclTransport(engine.Backend, memory.Ranks),
    };

    // The wait is cancelled, not the write: a cancelled write resets the stream, and the client would not get the reason.
    private Task ReplyAsync(UpdateReply reply, CancellationToken cancellation)
        => replies.WriteAsync(reply, CancellationToken.None).WaitAsync(cancellation);

    private static Segment? ToWire(SealedMemory? memory)
        => memory is null ? null : new Segment { Path = memory.Path, Name = memory.Name, Bytes = (ulong)memory.Bytes };
}
