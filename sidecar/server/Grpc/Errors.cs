using Grpc.Core;
using Rollout.Engine;
using Rollout.Server.Generation;
using Rollout.Server.Hosting;

namespace Rollout.Server.Grpc;

/// <summary>Maps the engine's errors to gRPC statuses.</summary>
internal static class Errors
{
    /// <summary>The status of an error that a client can act on; null for an internal error.</summary>
    public static Status? ToStatus(Exception exception) => exception switch
    {
        RpcException rpc => rpc.Status,
        InvalidRequestException or UpdateRejectedException => new Status(StatusCode.InvalidArgument, exception.Message),
        NoRoomException => new Status(StatusCode.ResourceExhausted, exception.Message),
        EngineStateException state =>
            new Status(StatusCode.FailedPrecondition, $"{state.State.ToString().ToUpperInvariant()}: {state.Message}"),
        UpdateFailedException => new Status(StatusCode.Aborted, exception.Message),
        ScoreFailedException { Reason: FinishReason.Abort } => new Status(StatusCode.Aborted, exception.Message),
        ScoreFailedException => new Status(StatusCode.Internal, exception.Message),
        EngineFaultedException or NotServingException => new Status(StatusCode.Unavailable, exception.Message),
        OperationCanceledException => new Status(StatusCode.Cancelled, "the call was cancelled"),
        _ => null,
    };
}
