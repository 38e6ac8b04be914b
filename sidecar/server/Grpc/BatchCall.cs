using Grpc.Core;
using Rollout.Server.Generation;
using Rollout.V1;

namespace Rollout.Server.Grpc;

/// <summary>RolloutService.GenerateBatch.</summary>
internal sealed class BatchCall(Func<GenerateRequest, GroupStream> start, IServerStreamWriter<GenerateReply> responses, ILogger logger)
    : GroupBatch<GenerateRequest, GenerateReply>
{
    /// <summary>Most replies written to the buffer before a flush while more are ready: a flush costs more than a write.</summary>
    private const int RepliesASend = 16;

    private static readonly WriteOptions s_send = new();
    private static readonly WriteOptions s_moreFollow = new(WriteFlags.BufferHint);

    private int _unsent;

    protected override GroupStream Start(GenerateRequest request) => start(request);

    protected override GenerateReply Convert(GroupStream group, in GroupReply reply) => Replies.Reply(group.Request.Id, reply);

    protected override GenerateReply? Refusal(GenerateRequest request, Exception exception)
    {
        if (Errors.ToStatus(exception) is not { } status) return null;
        Log.Refused(logger, $"group '{request.RequestId}'", status.StatusCode.ToString(), status.Detail);
        return new GenerateReply
        {
            RequestId = request.RequestId,
            Refused = new Refusal { Code = (int)status.StatusCode, Message = status.Detail },
        };
    }

    protected override Task WriteAsync(GenerateReply reply, bool moreReady, CancellationToken cancellation)
    {
        bool wait = ++_unsent < RepliesASend && moreReady;
        if (!wait) _unsent = 0;
        responses.WriteOptions = wait ? s_moreFollow : s_send;
        return responses.WriteAsync(reply, cancellation);
    }
}
