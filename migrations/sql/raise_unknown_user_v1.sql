-- Says why a user has no interests: nobody by that name, or nobody that the generation was built with.
create or replace function raise_unknown_user(user_id text, generation bigint) returns void
language plpgsql stable parallel safe
set search_path = polytower, public
as $$
begin
    if raise_unknown_user.user_id is null
       or not exists (select from users u where u.user_id = raise_unknown_user.user_id)
          and not exists (select from interactions i where i.user_id = raise_unknown_user.user_id) then
        raise exception 'there is no user "%"', coalesce(left(raise_unknown_user.user_id, 200), 'null')
            using errcode = 'PT002';
    end if;
    raise exception 'user "%" has no interests in generation %', left(raise_unknown_user.user_id, 200), generation
        using errcode = 'PT012',
              hint = 'the user is newer than the generation: HTTP computes interests from the newest events, SQL does not';
end $$;
