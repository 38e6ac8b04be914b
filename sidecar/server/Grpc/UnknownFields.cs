using System.Globalization;
using Google.Protobuf;
using Google.Protobuf.Reflection;
using Rollout.Engine;

namespace Rollout.Server.Grpc;

/// <summary>
/// protobuf silently keeps unknown fields. A client that requests a feature which this server does not have must get an error, not an
/// answer without it.
/// </summary>
internal static class UnknownFields
{
    /// <exception cref="InvalidRequestException">Lists every unknown field by its path and number.</exception>
    public static void Refuse(IMessage message)
    {
        ProblemList problems = Of(message);
        if (problems.Count > 0) throw new InvalidRequestException(problems);
    }

    /// <summary>One problem for each unknown field.</summary>
    public static ProblemList Of(IMessage message)
    {
        ProblemList problems = [];
        using CodedInputStream input = new(message.ToByteArray());
        Find(input, message.Descriptor, "", problems);
        return problems;
    }

    private static void Find(CodedInputStream input, MessageDescriptor type, string path, ProblemList problems)
    {
        while (input.ReadTag() is var tag and not 0)
        {
            int number = WireFormat.GetTagFieldNumber(tag);
            FieldDescriptor? field = type.FindFieldByNumber(number);
            if (field is null && problems.IsFull)
            {
                problems.AddUndescribed();
            }
            else if (field is null)
            {
                string name = path + number.ToString(CultureInfo.InvariantCulture);
                problems.Add(new Problem(name, $"this server knows no field {number} of {type.FullName}; the client may be newer"));
            }

            if (field is { FieldType: FieldType.Message } && WireFormat.GetTagWireType(tag) == WireFormat.WireType.LengthDelimited)
            {
                using CodedInputStream nested = new(input.ReadBytes().ToByteArray());
                Find(nested, field.MessageType, $"{path}{field.Name}.", problems);
                continue;
            }

            input.SkipLastField();
        }
    }
}
